"""Faults of the report group: what a report must refuse, count, hide or escape."""

import importlib.util
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from stepladder.core.errors import UserError
from stepladder.core.files import append_lines, read_json, read_lines, write_json
from stepladder.report import page

_SPEC = importlib.util.spec_from_file_location(
    "synthetic_ladder", Path(__file__).parents[1] / "unit" / "report" / "synthetic.py"
)
synthetic = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(synthetic)

OUTPUTS = ("verdict.json", "report.html", "report.md", "report.csv", "report.tex")


def report(folder, rungs, **options):
    options = {"items": 40, "curve": 5, "seeds": (0, 1, 2)} | options
    page.write(synthetic.ladder(folder, rungs, **options))
    return read_json(folder / "verdict.json")


def words(verdict, rung):
    return {c["metric"]: c["word"] for c in verdict["rungs"][rung]["primary"]}


def test_P1_one_seed_is_no_claim(tmp_path):
    rungs = {"plain": synthetic.Rung(iid=0.1, ood=0.1), "loop": synthetic.Rung(iid=0.95, ood=0.9, bits=1.5)}
    verdict = report(tmp_path / "x", rungs, seeds=(0,))
    assert set(words(verdict, "loop").values()) == {"no claim"}
    assert {c["word"] for c in verdict["rungs"]["loop"]["criteria"]} == {"no claim"}
    assert "One seed supports no claim" in (tmp_path / "x" / "report.html").read_text()


def test_P2_failed_seeds_are_listed_and_counted_as_worst(tmp_path):
    statuses = ("diverged", "failed", "crashed")
    rungs = {"plain": synthetic.Rung()} | {s: synthetic.Rung(iid=0.95, ood=0.9, status={1: s}) for s in statuses}
    verdict = report(tmp_path / "x", rungs)
    html, markdown = ((tmp_path / "x" / name).read_text() for name in ("report.html", "report.md"))
    for status in statuses:
        iid, _, bits = verdict["rungs"][status]["primary"]
        assert iid["rung_by_seed"][1] == 0
        assert bits["rung_by_seed"][1] == pytest.approx(8)
        assert iid["word"] != "better"
        assert f"{status}, seed 1: {status}; counted as the worst score" in html
        assert f"| {status}-s1 | {status} |" in markdown


def test_P2_a_run_without_an_end_supports_no_claim(tmp_path):
    statuses = ("started", "missing", "interrupted")
    rungs = {"plain": synthetic.Rung()} | {s: synthetic.Rung(iid=0.95, status={1: s}) for s in statuses}
    verdict = report(tmp_path / "x", rungs)
    html = (tmp_path / "x" / "report.html").read_text()
    for status in statuses:
        assert set(words(verdict, status).values()) == {"no claim"}
        assert f"<li>{status}, seed 1: " in html


def test_P3_perplexities_of_different_tokenizers_are_refused_and_bits_per_byte_shown(tmp_path):
    rungs = {"plain": synthetic.Rung(), "loop": synthetic.Rung(bits=1.9, tokenizer="bpe-512")}
    verdict = report(tmp_path / "x", rungs)
    assert not verdict["perplexity"]["comparable"]
    collapse = verdict["rungs"]["loop"]["criteria"][3]
    assert (collapse["word"], collapse["value"]) == ("not measured", None)
    assert words(verdict, "loop")["bits_per_byte:pydoc"] == "better"
    html = (tmp_path / "x" / "report.html").read_text()
    assert "Perplexity is not shown: 2 tokenizers" in html
    assert '<th scope="col">perplexity</th>' not in html


@pytest.mark.parametrize("name", ["metrics.jsonl", "records/algorithmic.jsonl", "records/likelihood.jsonl"])
@pytest.mark.parametrize("edit", ["change", "remove", "add"])
def test_P4_an_edited_line_is_refused_with_file_and_line(tmp_path, name, edit):
    folder = tmp_path / "x"
    synthetic.ladder(folder, {"plain": synthetic.Rung(), "loop": synthetic.Rung()}, items=10, curve=5)
    path = folder / "loop-s1" / name
    lines = path.read_text().splitlines(keepends=True)
    if edit == "change":
        lines[2] = re.sub(r"\d", lambda digit: str((int(digit[0]) + 1) % 10), lines[2], count=1)
    elif edit == "remove":
        del lines[2]
    else:
        lines.insert(2, lines[1])
    path.write_text("".join(lines))
    with pytest.raises(UserError, match=rf"loop-s1/{re.escape(name)}: line 3"):
        page.write(folder)
    assert not [output for output in OUTPUTS if (folder / output).exists()]


def test_P4_stated_results_that_are_not_the_records_are_refused(tmp_path):
    folder = synthetic.ladder(tmp_path / "x", {"plain": synthetic.Rung(), "loop": synthetic.Rung()}, items=10, curve=5)
    path = folder / "loop-s1" / "results_algorithmic.json"
    results = read_json(path)
    results["cells"][0]["accuracy"] = 0.99
    write_json(path, results)
    with pytest.raises(UserError, match=r"loop-s1/results_algorithmic\.json: accuracy of parity, 4, iid"):
        page.write(folder)


def test_P5_one_lucky_variant_of_ten_is_not_significant(tmp_path):
    rungs = {"plain": synthetic.Rung(spread=0)} | {f"variant{n}": synthetic.Rung(spread=0.02) for n in range(10)}
    verdict = report(tmp_path / "x", rungs, text=False, items=60, seeds=(0, 1, 2))
    found = [c for about in verdict["rungs"].values() for c in about["primary"]]
    assert len(found) == verdict["family"] == 20
    lucky = [c for c in found if c["p"] < 0.05]
    assert lucky  # uncorrected, somebody would have won
    assert {c["word"] for c in found} <= {"inconclusive", "equivalent"}
    assert min(c["p_holm"] for c in found) > 0.05


SECRETS = (
    "hf_abcdefghijklmnop",
    "sk-proj-abcdefghij",
    "AKIAIOSFODNN7EXAMPLE",
    "ghp_abcdefghijkl",
    "tr0ub4dor",
    "0p3ns3same",
)


def test_P6_secrets_are_in_no_artefact(tmp_path):
    extra = {"fields": {"kind": "loop", "hub": {"api_key": "0p3ns3same"}}, "factor": f"login {SECRETS[1]}"}
    rungs = {"plain": synthetic.Rung(), "loop": synthetic.Rung(extra=extra, status={1: "failed"})}
    folder = synthetic.ladder(
        tmp_path / "x",
        rungs,
        items=10,
        curve=5,
        command=f"HF_TOKEN={SECRETS[0]} stepladder climb x.yaml",
        ladder={"run": {"data": {"hub_token": SECRETS[5]}}},
    )
    for run in ("plain-s0", "loop-s1"):
        env = {"HF_TOKEN": SECRETS[0], "AWS": SECRETS[2], "DB_PASSWORD": SECRETS[4]}
        session = {"device": "cpu", "env": env, "argv": ["--token", SECRETS[3]]}
        write_json(folder / run / "provenance.json", {"sessions": [session]})
    summary = read_json(folder / "loop-s1" / "summary.json")
    write_json(folder / "loop-s1" / "summary.json", summary | {"reason": f"403 for token={SECRETS[4]}"})
    page.write(folder)
    for output in OUTPUTS:
        text = (folder / output).read_text()
        assert not [secret for secret in SECRETS if secret in text], output
    html = (folder / "report.html").read_text()
    assert "403 for token=[redacted]" in html
    assert "HF_TOKEN=[redacted] stepladder climb x.yaml" in html


NASTY = "<script>alert('x')</script>|$x_1^{\n--> \"&\\ =cmd"


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.add(tag)
        self.found |= {name for name, _ in attrs}


def test_P7_names_are_escaped_in_every_format(tmp_path):
    rungs = {"plain": synthetic.Rung(), NASTY: synthetic.Rung(iid=0.9, status={2: "diverged"})}
    folder = tmp_path / "x"
    report(folder, rungs, name="=ladder <b>|\n# $", curve=8)
    html = (folder / "report.html").read_text()
    assert not Tags(html).found & {"script", "bold", "onerror"}
    assert "&lt;script&gt;" in html
    assert "<script" not in html
    markdown = (folder / "report.md").read_text()
    assert "<script" not in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("| &lt;script")]
    assert len(rows) == 3 + 4 + 1  # verdicts, criteria, costs: none of them broken by the newline
    assert {re.sub(r"\\.", "", row).count("|") for row in rows[:3]} == {9}
    latex = (folder / "report.tex").read_text()
    assert latex.count(r" \\" + "\n") == 4
    assert r"\textless{}script\textgreater{}" in latex
    assert r"\$x\_1\textasciicircum{}\{" in latex
    table = (folder / "report.csv").read_text()
    assert "'=ladder <b>|" in table
    assert len(table.splitlines()) == 1 + 3 + 4
    assert read_json(folder / "verdict.json")["rungs"][NASTY]


def test_P7_a_name_cannot_leave_its_link(tmp_path):
    name = 'a" onmouseover="x'
    folder = synthetic.ladder(tmp_path / "x", {"plain": synthetic.Rung(), name: synthetic.Rung()}, items=10, curve=5)
    ladder = read_json(folder / "ladder.json")
    for seed in ("0", "1", "2"):
        place = ladder["runs"][name][seed]
        (folder / place).rename(folder / f"javascript:{name} {seed}")
        ladder["runs"][name][seed] = f"javascript:{name} {seed}"
    write_json(folder / "ladder.json", ladder)
    html = page.write(folder).read_text()
    assert 'href="javascript:' not in html
    assert "onmouseover" not in Tags(html).found
    assert "javascript%3Aa%22%20onmouseover%3D%22x%200/config.json" in html


def test_a_forged_record_with_an_honest_chain_is_still_noticed(tmp_path):
    folder = synthetic.ladder(tmp_path / "x", {"plain": synthetic.Rung(), "loop": synthetic.Rung()}, items=10, curve=5)
    path = folder / "loop-s1" / "records" / "algorithmic.jsonl"
    lines = [line | {"correct": True} for line in read_lines(path)]
    path.unlink()
    append_lines(path, lines)
    with pytest.raises(UserError, match="one of the two was edited"):
        page.write(folder)
