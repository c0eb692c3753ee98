from __future__ import annotations

import base64
import hashlib

import pytest

from vitkit.web import pages


def test_text_of_others_is_escaped_in_the_documentation():
    schema = {
        "info": {"title": "<script>1</script>", "description": "a & `b<c`"},
        "paths": {"/x": {"get": {"description": "<b>", "responses": {"200": {"description": "<i>"}}}}},
    }
    html = pages.documentation(schema, "<u>home").html
    assert not any(f"<{tag}" in html for tag in ("script", "b>", "i>", "u>"))
    assert "a &amp; <code>b&lt;c</code>" in html and "&lt;u&gt;home</a>" in html


def test_defaults_are_told_where_there_are_some():
    def told(default):
        about = [{"name": "x", "description": "What.", "schema": {"default": default}}]
        schema = {"info": {"title": ""}, "paths": {"/": {"get": {"parameters": about}}}}
        return pages.documentation(schema, "home").html.partition("What.")[2].partition("<")[0]

    assert [told(v) for v in (None, "", 0, False, "a")] == ["", "", " (default 0)", " (default false)", " (default a)"]


def test_the_policy_names_the_hash_of_each_script_and_style():
    made = pages.page("<style>a</style><script>b\n</script><script>c</script>")
    for text in ("a", "b\n", "c"):
        assert f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in made.policy
    assert "script-src 'none'; style-src 'none'" in pages.page("<p>").policy
    assert "unsafe" not in made.policy and "default-src 'none'" in made.policy


@pytest.mark.parametrize("package", ["vitkit.deploy.server", "vitkit.catalogue.page"])
def test_pages_have_the_common_style(package):
    html = pages.read(package).html
    assert pages.BASE not in html and html.count("--accent: #1a4fc4") == 1
