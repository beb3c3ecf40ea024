"""The page: self-contained, honest about gaps, every number a link, the same bytes every time."""

import csv
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest

from stepladder.core.files import read_json, write_json
from stepladder.report import page

VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """Tags in balance, links, ids, and the text of the page."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.ids, self.text = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.links += [value for name, value in attrs if name in ("href", "src") and tag == "a"]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def folder(synthetic, tmp_path_factory):
    rungs = {
        "plain": synthetic.Rung(),
        "loop": synthetic.Rung(iid=0.97, ood=0.9),
        "ponder": synthetic.Rung(spread=0.05, status={2: "diverged"}),
        "half": synthetic.Rung(status={1: "missing", 2: "started"}),
        "lstm": synthetic.Rung(iid=0.3, floor=True),
    }
    folder = synthetic.ladder(tmp_path_factory.mktemp("page") / "first", rungs, items=150, curve=10)
    synthetic.depth(folder / "loop-s0")
    assert page.write(folder) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def parsed(folder):
    return Page((folder / "report.html").read_text())


def test_tags_balance_and_ids_are_unique(parsed):
    assert parsed.open == []
    assert len(parsed.ids) == len(set(parsed.ids))


def test_self_contained(parsed):
    tags = {tag for tag, _ in parsed.tags}
    assert not tags & {"script", "link", "img", "iframe", "object"}
    assert not [value for _, attrs in parsed.tags for value in attrs.values() if value and "//" in value]


def test_links_lead_to_files_or_places(folder, parsed):
    assert len(parsed.links) > 40
    for link in parsed.links:
        if link.startswith("#"):
            assert link[1:] in parsed.ids
        else:
            assert (folder / unquote(link)).is_file(), link
    assert "loop-s1/results_algorithmic.json" in parsed.links
    assert "ponder-s2/metrics.jsonl" in parsed.links


def test_words_numbers_and_troubles_are_on_the_page(parsed):
    text = " ".join(" ".join(parsed.text).split())
    for words in (
        "Better in accuracy at training sizes",
        "No claim yet: seed 1, 2 has no result",
        "A floor, shown for scale and not judged",
        "ponder, seed 2: diverged; counted as the worst score",
        "half, seed 1: missing, has not been run",
        "half, seed 2: unfinished, was started",
        "2 of 15 runs have no result yet",
        "stepladder climb ladders/first.yaml",
        "stepladder report runs/first",
        "at least 5 points more accurate",
        "more seed",
        "accuracy over size and ticks",
    ):
        assert words in text, words


def test_every_figure_is_there(parsed):
    labels = [attrs["aria-label"] for tag, attrs in parsed.tags if tag == "svg"]
    assert labels.count("Training loss of every rung over tokens") == 1
    assert sum(label.startswith("Differences from the control") for label in labels) == 3
    assert sum(label.startswith("Accuracy over size: ") for label in labels) == 2
    assert sum(label.startswith("Accuracy grid: ") for label in labels) == 2
    assert "Accuracy over size and ticks: parity" in labels


def test_the_other_formats_say_the_same(folder):
    verdict = read_json(folder / "verdict.json")
    rows = list(csv.DictReader((folder / "report.csv").read_text().splitlines()))
    primary = [row for row in rows if row["family"] == "primary"]
    assert len(primary) == 4 * 3
    first = verdict["rungs"]["loop"]["primary"][0]
    assert float(primary[0]["difference"]) == first["difference"]
    assert primary[0]["word"] == first["word"] == "better"
    markdown = (folder / "report.md").read_text()
    assert "| loop | accuracy at training sizes |" in markdown
    assert "half-s1 | missing: has not been run |" in markdown
    assert r"loop & accuracy at training sizes &" in (folder / "report.tex").read_text()


def test_the_same_files_give_the_same_bytes(folder):
    names = ("verdict.json", "report.html", "report.md", "report.csv", "report.tex")
    before = [(folder / name).read_bytes() for name in names]
    page.write(folder)
    assert [(folder / name).read_bytes() for name in names] == before


def test_verdict_names_the_files_behind_it_by_hash(folder):
    runs = read_json(folder / "verdict.json")["runs"]
    complete = [run for run in runs if run["status"] == "complete"]
    assert all(len(run["files"]["records/algorithmic.jsonl"]) == 64 for run in complete)


def test_a_ladder_where_nothing_has_run(synthetic, tmp_path):
    missing = synthetic.Rung(status={0: "missing", 1: "missing"})
    folder = synthetic.ladder(tmp_path / "empty", {"plain": missing, "loop": missing}, seeds=(0, 1))
    parsed = Page(page.write(folder).read_text())
    assert "Nothing can be said yet: 4 of 4 runs have no result." in "".join(parsed.text)
    assert not [tag for tag, _ in parsed.tags if tag == "svg"]


def test_every_run_failed(synthetic, tmp_path):
    dead = synthetic.Rung(status={0: "diverged", 1: "failed"})
    folder = synthetic.ladder(tmp_path / "dead", {"plain": dead, "loop": dead}, seeds=(0, 1), curve=5)
    assert "Nothing was measured" in page.write(folder).read_text()


def test_a_ladder_of_the_control_alone(synthetic, tmp_path):
    folder = synthetic.ladder(tmp_path / "alone", {"plain": synthetic.Rung()}, items=10, curve=5)
    assert "control <b>plain</b>" in page.write(folder).read_text()


@pytest.mark.parametrize(
    ("adapters", "says"), [(None, "started from <b>base, all weights"), ({"rank": 8}, "<b>base, adapters of rank 8")]
)
def test_what_the_runs_started_from_stands_at_the_top(synthetic, tmp_path, adapters, says):
    folder = synthetic.ladder(tmp_path / "later", {"plain": synthetic.Rung()}, items=10, curve=5)
    assert "started from" not in page.write(folder).read_text()
    about = read_json(folder / "ladder.json")
    write_json(folder / "ladder.json", {**about, "ladder": {"start": {"ladder": "base", "adapters": adapters}}})
    assert says in page.write(folder).read_text()


def test_the_report_does_not_import_torch():
    code = "import sys, stepladder.report.page; sys.exit('torch' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
