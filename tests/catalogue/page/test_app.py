"""The routes of the page of papers."""

from __future__ import annotations

import logging

import pytest
from fastapi.testclient import TestClient

from vitkit.catalogue import load, reader
from vitkit.catalogue.digests import Digest, Row
from vitkit.catalogue.library import Library
from vitkit.catalogue.page import make_app, shelf

HERE = "http://127.0.0.1"


@pytest.fixture
def client(path):
    with TestClient(make_app(path), base_url=HERE) as made:
        yield made


def ask(client, **options):
    answer = client.get("/api/papers", params={"limit": 200, **options})
    assert answer.status_code == 200, answer.text
    return answer.json()


def ids(client, **options):
    return [paper["id"] for paper in ask(client, **options)["papers"]]


def test_library_and_catalogue_are_listed_together(client):
    found = ask(client)
    assert found["total"] == len({e.id or e.name for e in load().values()} | {"9901.00001", "hep-th/9901001"})
    both = next(p for p in found["papers"] if p["id"] == "2504.02692")
    entry = load()["gptaq"]
    assert both["implemented"] == "yes" and both["in_library"] and both["run"] == "vitkit show gptaq"
    assert both["family"] == entry.family and both["gist"] == entry.summary and both["sections"] == ["Quantization"]
    own = ask(client, implemented="unlisted")["papers"]
    assert [p["id"] for p in own] == ["9901.00001", "hep-th/9901001"]
    assert all(p["evidence"] == "none" and p["family"] == p["run"] == "" for p in own)
    assert own[1]["gist"].endswith(" …") and len(own[1]["gist"]) < 260


def test_facets_say_how_many_there_would_be(client):
    chosen = {"implemented": "yes", "family": "base"}
    facets = ask(client, **chosen)["facets"]
    for name, counts in facets.items():
        for value, number in counts.items():
            assert ask(client, **{**chosen, name: value, "limit": 1})["total"] == number, (name, value)
    assert facets["implemented"]["yes"] and facets["evidence"]["compared"]
    assert list(facets["section"]) == ['Zebras "><i>', "Papers for 1999-01-01", "Quantization"]


def test_evidence_is_told_as_the_files_have_it(client):
    verdicts = {p["name"]: p["evidence"] for p in ask(client, implemented="yes")["papers"]}
    assert verdicts["gptaq"] == "shown"
    # a baseline's figures stand in the experiment of another paper, whose claim it is
    assert verdicts["gptq"] == verdicts["rtn"] == "compared"
    assert {p["evidence"] for p in ask(client, implemented="unlisted")["papers"]} == {"none"}


@pytest.mark.parametrize("options", [{}, {"q": "attention"}, {"sort": "title"}, {"sort": "oldest"}])
def test_pages_make_up_the_whole(client, options):
    total = ask(client, **options)["total"]
    pages = [ids(client, offset=at, limit=37, **options) for at in range(0, total + 37, 37)]
    together = [key for page in pages for key in page]
    assert len(together) == len(set(together)) == total > 37 and pages[-1] == []
    assert all(len(page) == 37 for page in pages[:-2])


def test_orders(client):
    dated = [p["date"] for p in ask(client, sort="newest")["papers"]]
    assert dated == sorted(dated, reverse=True)
    dated = [p["date"] for p in ask(client, sort="oldest", offset=100)["papers"]]
    assert [d for d in dated if d] == sorted(d for d in dated if d) and dated[-1] == ""
    titles = [p["title"].casefold() for p in ask(client, sort="title")["papers"]]
    assert titles == sorted(titles)
    assert ids(client, q="zebras", sort="best") == ids(client, q="zebras")
    assert ids(client)[:5] == ids(client, sort="newest")[:5]


def test_words_and_filters_go_together(client):
    assert set(ids(client, q="zebras")) == {"9901.00001", "hep-th/9901001"}
    assert ids(client, q="zebras", section='Zebras "><i>') == ["9901.00001"]
    assert ids(client, q="zebras", implemented="yes") == []
    assert ids(client, q="gptaq", family="compress", evidence="shown") == ["2504.02692"]


def test_all_about_a_paper(client, hostile):
    paper = client.get("/api/papers/9901.00001").json()
    assert paper["title"] == hostile and paper["abstract"].endswith(hostile) and paper["record"] is None
    assert paper["versions"] == [{"version": 2, "date": "1999-01-02"}, {"version": 1, "date": "1999-01-01"}]
    paper = client.get("/api/papers/hep-th/9901001").json()
    assert paper["authors"] == ["A. Zebra", "<b>B"] and paper["summary"].startswith("Strings.")
    paper = client.get("/api/papers/2504.02692").json()
    assert [m["study"] for m in paper["methods"]] == ["vitkit study ./my-images --recipes vit,gptaq"]
    record = paper["record"]
    assert record["verdict"] == paper["evidence"] == "shown" and record["claim"]
    assert all(len(row) == len(record["columns"]) == len(record["numeric"]) for row in record["cells"])
    paper = client.get("/api/papers/rtn").json()
    # a catalogue's summary is no digest's
    assert paper["url"] == paper["summary"] == "" and paper["gist"] and paper["record"]["name"] == "gptaq"


def test_how_a_method_is_used(client, monkeypatch):
    told = client.get("/api/methods/sinkhorn").json()
    assert told["study"][0] == "vitkit study ./my-images --recipes vit,sinkhorn" and told["problem"] == ""
    assert told["python"][0] == "import vitkit" and told["purpose"]
    broken = reader.Method(name="sinkhorn", dotted="no_such_package:f", kind="part", slot="", entry=load()["qdsformer"])
    monkeypatch.setattr("vitkit.catalogue.page.app.methods", lambda: {"sinkhorn": broken})
    told = client.get("/api/methods/sinkhorn").json()
    assert "no_such_package" in told["problem"] and told["python"] == []


@pytest.mark.parametrize(
    "address, status, message",
    [
        ("/api/papers/1234.56789", 404, "No paper is called '1234.56789'"),
        ("/api/papers/../../etc/passwd", 404, ""),
        ("/api/papers/%2e%2e/%2e%2e/etc/passwd", 404, ""),
        ("/api/methods/sinkhor", 404, "Did you mean 'sinkhorn'?"),
        ("/nothing", 404, "/docs lists what is"),
        ("/api/papers?family=compres", 422, "Did you mean 'compress'?"),
        ("/api/papers?section=nowhere", 422, "No section is called 'nowhere'"),
        ("/api/papers?evidence=proved", 422, "evidence: Input should be"),
        ("/api/papers?implemented=maybe", 422, "'unlisted'"),
        ("/api/papers?sort=random", 422, "sort: "),
        ("/api/papers?offset=-1", 422, "offset: "),
        ("/api/papers?limit=0", 422, "limit: "),
        ("/api/papers?limit=1000000", 422, "200"),
        ("/api/papers?limit=many", 422, "limit: "),
        ("/api/papers?q=" + "x" * 501, 422, "500 characters"),
    ],
)
def test_what_is_wrong_is_told_in_a_sentence(client, address, status, message):
    answer = client.get(address)
    assert answer.status_code == status and message in answer.json()["error"]


@pytest.mark.parametrize("method", ["post", "put", "patch", "delete"])
def test_nothing_can_be_changed(client, path, method):
    before = path.read_bytes()
    for address in ("/", "/api/papers", "/api/papers/9901.00001", "/api/methods/sinkhorn"):
        assert getattr(client, method)(address).status_code == 405
    ask(client, q="zebras")
    assert path.read_bytes() == before


def test_headers_of_every_answer(client):
    for address in ("/", "/docs", "/openapi.json", "/api/papers", "/nothing", "/api/papers?limit=0"):
        headers = client.get(address).headers
        assert "default-src 'none'" in headers["content-security-policy"], address
        assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"
    assert client.get("/").headers["content-type"].startswith("text/html")
    assert client.get("/api/papers").headers["content-type"] == "application/json"
    assert "<code>GET /api/papers/{paper}</code>" in client.get("/docs").text


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8010", "127.0.0.1.evil.example", "", "[", "192.168.0.1"]
)
def test_other_names_for_this_machine_are_refused(client, host):
    answer = client.get("/api/papers", headers={"Host": host})
    assert answer.status_code == 421 and "127.0.0.1" in answer.json()["error"]


def test_its_own_names_are_not(client, path):
    for host in ("127.0.0.1:8010", "localhost", "LocalHost:1", "[::1]:8010"):
        assert client.get("/api/papers", headers={"Host": host}).status_code == 200
    with TestClient(make_app(path, hosts=None)) as anywhere:
        assert anywhere.get("/api/papers", headers={"Host": "shelf.example"}).status_code == 200


def test_a_library_is_read_again_only_when_it_has_changed(client, path, monkeypatch):
    loads, papers = [], shelf.papers
    monkeypatch.setattr(shelf, "papers", lambda library: loads.append(1) or papers(library))
    before = ask(client, q="zebras")["total"]
    for _ in range(3):
        assert ask(client, q="zebras")["total"] == before
    assert len(loads) == 1
    with Library(path) as library:
        library.merge(Digest(rows=(Row(arxiv_id="9902.00001", title="More zebras"),)))
        # an import is seen while the importing program still runs
        assert ask(client, q="zebras")["total"] == before + 1
    path.unlink()
    assert ids(client, q="zebras") == []


def test_a_library_is_not_made_by_looking_for_it(tmp_path):
    with TestClient(make_app(tmp_path / "none" / "papers.db"), base_url=HERE) as client:
        found = ask(client)
        assert found["total"] == len({e.id or e.name for e in load().values()}) and not found["facets"]["section"]
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_library_is_named(client, path):
    ask(client)
    path.write_bytes(b"no database " * 1000)
    answer = client.get("/api/papers")
    assert answer.status_code == 503 and str(path) in answer.json()["error"]
    path.unlink()
    assert client.get("/api/papers").status_code == 200


def test_a_fault_of_ours_is_one_sentence(client, monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("secret")

    monkeypatch.setattr(shelf, "search", fail)
    with caplog.at_level(logging.ERROR, "vitkit.papers"):
        answer = client.get("/api/papers?q=x")
    assert answer.status_code == 500 and "secret" not in answer.text and "secret" in caplog.text
    assert answer.headers["cache-control"] == "no-store"


def test_only_some_queries_are_kept(path):
    made = shelf.Shelf(path)
    for number in range(40):
        made.list_papers(f"zebras {number}")
    assert len(made._found) == shelf._QUERIES
    made.close()
