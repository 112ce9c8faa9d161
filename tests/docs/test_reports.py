"""SECURITY.md and the templates of issues: what they ask for is there."""

from __future__ import annotations

import json
import re
import shlex

import pytest
from checkout import ROOT

from gcnet_ext.__main__ import main

TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.md"))


def test_links_of_the_security_page_lead_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", (ROOT / "SECURITY.md").read_text())
    assert links
    assert all((ROOT / link).is_file() for link in links)


@pytest.mark.skipif(not TEMPLATES, reason="a copy of the sources has no .github")
def test_each_template_has_a_name_and_asks_for_what_the_command_prints(capsys):
    assert len(TEMPLATES) == 2
    for template in TEMPLATES:
        text = template.read_text()
        assert re.match(r"---\nname: \S.*\nabout: \S.*\n---\n", text), template
        (command,) = re.findall(r"^```\n(.*)\n^```$", text, re.MULTILINE)
        python, flag, module, *arguments = shlex.split(command)
        assert (python, flag, module) == ("python", "-m", "gcnet_ext")
        assert main(arguments) == 0
        assert {"gcnet_ext", "built", "machine", "torch"} <= json.loads(capsys.readouterr().out).keys()
