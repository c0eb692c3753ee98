"""The record of an experiment, its statistics and its file."""

from __future__ import annotations

import json
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitkit.catalogue import load
from vitkit.cli.shell import app
from vitkit.errors import BadInput, VitkitError
from vitkit.evidence import Evidence, paired, read_evidence, run_evidence, runner, summarise

values = st.lists(st.floats(-100, 100), min_size=1, max_size=30)


@settings(deadline=None, max_examples=30)
@given(a=values, shift=st.floats(-5, 5), seed=st.integers(0, 9))
def test_a_constant_difference_has_a_point_interval(a, shift, seed):
    mean, low, high = paired(np.add(a, shift), a, seed=seed, resamples=50)
    np.testing.assert_allclose([mean, low, high], shift, atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(a=values, seed=st.integers(0, 9))
def test_swapping_the_two_negates_the_mean_and_the_interval_brackets_it(a, seed):
    b = np.random.default_rng(seed).normal(size=len(a))
    mean, low, high = paired(a, b, seed=seed, resamples=200)
    back, back_low, back_high = paired(b, a, seed=seed, resamples=200)
    np.testing.assert_allclose([back, back_low, back_high], [-mean, -high, -low], atol=1e-9)
    assert low - 1e-9 <= np.median([low, mean, high]) <= high + 1e-9


def test_the_interval_agrees_with_the_normal_one_for_many_items():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.3, 1, 4000), np.zeros(4000)
    mean, low, high = paired(a, b, resamples=4000)
    half = 1.96 * a.std(ddof=1) / np.sqrt(4000)
    np.testing.assert_allclose([low, high], [mean - half, mean + half], atol=0.004)


def test_coverage_of_the_interval():
    rng = np.random.default_rng(1)
    hits = 0
    for i in range(200):
        _, low, high = paired(rng.normal(0.5, 1, 60), np.zeros(60), resamples=400, seed=i)
        hits += low <= 0.5 <= high
    # binomial(200, 0.95) has sd 3; the percentile interval is a little narrow at 60 items
    assert 176 <= hits <= 199


def test_many_items_need_little_memory():
    mean, low, high = paired(np.ones(300_000), np.zeros(300_000), resamples=20)
    assert (mean, low, high) == (1, 1, 1)


def test_same_seed_same_interval_and_resamples_all_drawn():
    a, b = [1.0, 2, 5, 3], [0.0, 2, 1, 1]
    assert paired(a, b) == paired(a, b)
    assert paired(a, b, seed=1, resamples=7) != paired(a, b, seed=2, resamples=7)


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        ([1], [1, 2], {}, "a has 1 of them, b has 2"),
        ([], [], {}, "no values"),
        ([1, float("nan")], [1, 2], {}, "1 of 2 values are NaN"),
        ([1], [1], {"confidence": 95}, "between 0 and 1"),
        ([1], [1], {"resamples": 0}, "resamples"),
    ],
)
def test_bad_values_are_explained(a, b, options, message):
    with pytest.raises(BadInput, match=message):
        paired(a, b, **options)


def test_summarise():
    assert summarise([0.9, 0.92, 0.94]) == "0.920 ± 0.020"
    assert summarise([3.14159], digits=1) == "3.1"
    with pytest.raises(BadInput):
        summarise([])


def test_an_evidence_needs_a_claim_and_rows_of_equal_columns():
    with pytest.raises(BadInput, match="claim"):
        Evidence(claim=" ", shown=True, rows=[{"a": 1}])
    with pytest.raises(BadInput, match="row"):
        Evidence(claim="c", shown=True, rows=[])
    with pytest.raises(BadInput, match=r"row 1 .* \['b'\]"):
        Evidence(claim="c", shown=True, rows=[{"a": 1}, {"b": 1}])


@pytest.fixture
def experiment(monkeypatch):
    """Pretend that the entry ``gmar`` has this experiment."""

    def install(run):
        module = types.ModuleType("vitkit.evidence.gmar")
        module.run = run
        monkeypatch.setitem(sys.modules, "vitkit.evidence.gmar", module)

    return install


def finding(seeds=(0, 1, 2), progress=None):
    if progress:
        progress("train", 1, 2)
    return Evidence(
        claim="It helps.",
        shown=None,
        rows=[{"arm": "a", "accuracy": torch.tensor(0.5), "gap": np.float64("nan")}],
        notes="n",
        settings={"sizes": (1, 2), "array": np.arange(2)},
    )


def test_running_writes_everything_needed_to_repeat_it(experiment, tmp_path):
    experiment(finding)
    seen = []
    record, path = run_evidence("gmar", seeds=(3, 4), out=tmp_path, progress=lambda *a: seen.append(a))
    assert path == tmp_path / "2504.19414.json"
    stored = json.loads(path.read_text())
    assert stored == record
    assert stored["rows"] == [{"arm": "a", "accuracy": 0.5, "gap": None}]
    assert stored["settings"] == {"sizes": [1, 2], "array": [0, 1]}
    assert stored["seeds"] == [3, 4] and stored["shown"] is None and stored["claim"] == "It helps."
    assert stored["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert stored["machine"]["cores"] >= 1 and stored["machine"]["cpu"]
    assert {"commit", "duration_s", "date", "notes", "title"} <= set(stored)
    assert seen == [("train", 1, 2)]


def test_an_arxiv_id_names_the_same_experiment(experiment, tmp_path):
    experiment(finding)
    assert run_evidence("2504.19414v1", out=tmp_path)[0]["name"] == "gmar"


def test_a_failing_experiment_leaves_the_old_file(experiment, tmp_path):
    experiment(finding)
    _, path = run_evidence("gmar", out=tmp_path)
    before = path.read_bytes()

    def broken(seeds, progress):
        raise RuntimeError("broken")

    experiment(broken)
    with pytest.raises(RuntimeError):
        run_evidence("gmar", out=tmp_path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_an_experiment_must_return_an_evidence(experiment, tmp_path):
    experiment(lambda seeds, progress: {"rows": []})
    with pytest.raises(BadInput, match="returned a dict"):
        run_evidence("gmar", out=tmp_path)


def test_an_entry_without_an_experiment_says_so(tmp_path):
    with pytest.raises(VitkitError, match="'wan' has no experiment yet"):
        run_evidence("wan", out=tmp_path)


def test_files_are_found_in_the_project_and_then_in_the_package(monkeypatch, tmp_path):
    entry = load()["gmar"]
    monkeypatch.setattr(runner, "_project_folder", lambda: None)
    monkeypatch.setattr(runner, "_PACKAGED", tmp_path)
    assert read_evidence(entry) is None
    (tmp_path / "2504.19414.json").write_text('{"claim": "packaged"}')
    assert read_evidence(entry) == {"claim": "packaged"}
    project = tmp_path / "project"
    project.mkdir()
    (project / "2504.19414.json").write_text('{"claim": "project"}')
    monkeypatch.setattr(runner, "_project_folder", lambda: project)
    assert read_evidence(entry) == {"claim": "project"}


def test_an_entry_without_a_paper_uses_its_name():
    assert runner.file_name(load()["rtn"]) == "rtn.json"


def test_the_command_prints_the_table_and_the_path(experiment, tmp_path):
    from typer.testing import CliRunner

    experiment(finding)
    done = CliRunner().invoke(app, ["evidence", "gmar", "--seeds", "5", "--out", str(tmp_path)], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    for part in ("It helps.", "undecided", "accuracy", "0.5", "–", "2504.19414.json"):
        assert part in done.output
    assert json.loads((tmp_path / "2504.19414.json").read_text())["seeds"] == [5]
