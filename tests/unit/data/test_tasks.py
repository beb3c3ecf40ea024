"""Every task: right answers, honest sizes and labels, and nothing that a shortcut could live on."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from stepladder.data.base import Examples, Task
from stepladder.data.programs import Claim, question_of, record
from stepladder.data.tasks import TASKS
from stepladder.data.tasks.addition import Addition
from stepladder.data.tasks.chain import Chain
from stepladder.data.tasks.compare import Compare
from stepladder.data.tasks.dp_table_stripe import DpTableStripe
from stepladder.data.tasks.dyck import Dyck
from stepladder.data.tasks.freivalds import Freivalds
from stepladder.data.tasks.listops import ListOps
from stepladder.data.tasks.miller_rabin import MillerRabin, _is_prime, _passes, _primes, _products, _strong
from stepladder.data.tasks.mod_add import ModAdd
from stepladder.data.tasks.nested_loop_count import NestedLoopCount
from stepladder.data.tasks.parity import Parity
from stepladder.data.tasks.recall import Recall
from stepladder.data.tasks.scan_reduce import ScanReduce
from stepladder.data.tasks.sort_then_scan import SortThenScan
from stepladder.data.tasks.state_tracking import StateTracking
from stepladder.data.tasks.substring_count import SubstringCount
from stepladder.data.tasks.successor import Successor

VARIANTS: list[Task] = [TASKS.get(name)() for name in TASKS.names()] + [
    Addition(reversed=True),
    Chain(steps=10),
    Dyck(types=3, depth=12),
    ListOps(operands=2),
    ListOps(operands=5),
    ModAdd(train=(97, 97)),
    Recall(queries=26),
    StateTracking(group="S5"),
    DpTableStripe(letters=26),
    NestedLoopCount(low=-20_000, high=20_000),
    ScanReduce(low=-3, high=999_999),
    SortThenScan(low=0, high=9),
    SubstringCount(letters=3, longest=2),
    SubstringCount(first="x"),
    DpTableStripe(first="q"),
    Freivalds(rounds=3),
    MillerRabin(rounds=2),
]
NAMES = [f"{t.kind}-{i}" if i >= len(TASKS.names()) else t.kind for i, t in enumerate(VARIANTS)]
every = pytest.mark.parametrize("task", VARIANTS, ids=NAMES)


def draw(task: Task, size: int | tuple[int, int], n: int = 600, split: str = "train") -> Examples:
    return task.batch(3, split, np.arange(n), size)


def majority(answers: list[str]) -> float:
    return max(Counter(answers).values()) / len(answers)


def measured_size(task: Task, question: str) -> int:
    """The size read off the question's text."""
    if task.complexity:
        x, _ = record(question, "")
        if found := re.search(r"arr=(.*)", x):
            return found[1].count(",") + 1
        first = x.split("; ")[0].split("=")[1]
        return first.count("/") + 1 if task.kind == "freivalds" else len(first)
    body = re.sub(r"^\w+:|\^?=$", "", question)
    if task.kind in ("addition", "multiplication", "compare"):
        return max(map(len, re.split(r"[+*?]", body)))
    if task.kind == "mod_add":
        return int(body.split("%")[1])
    if task.kind == "chain":
        return len(body.split(">")[0])
    if task.kind == "recall":
        return len(body.split("?")[0]) // 2
    if task.kind == "listops":
        return body.count("(")
    if task.kind == "needle":
        return body.count(".")
    if task.kind == "repeat_copy":
        return len(body.split("x")[0])
    return len(body) // 2 if task.kind == "dyck" else len(body)


@every
def test_answers_are_what_the_oracle_says_and_sizes_are_kept(task):
    for size in (task.train, task.train[0], *task.iid, *task.ood[:2]):
        drawn = draw(task, size, 500 if isinstance(size, tuple) else 200)
        for question, answer, n in zip(drawn.questions(), drawn.answers(), drawn.size.tolist(), strict=True):
            assert task.solve(question) == answer, question
            assert task.verify(question, answer)
            assert measured_size(task, question) == n
            assert len(answer) <= task.max_answer(n)
            assert set(question + answer) <= set(task.alphabet)
            assert question.endswith("=")


@every
def test_largest_ood_cell(task):
    size = task.ood[-1]
    drawn = draw(task, size, 20, "test")
    assert [task.solve(q) for q in drawn.questions()] == drawn.answers()
    assert max(map(len, drawn.answers())) <= task.max_answer(size)


@every
def test_item_is_the_same_alone_permuted_and_beside_longer_ones(task):
    size = draw(task, task.train, 40).size
    whole = draw(task, task.train, 40)
    order = np.random.default_rng(0).permutation(40)
    permuted = task.batch(3, "train", order, task.train)
    assert permuted.questions() == [whole.questions()[i] for i in order]
    alone = [task.batch(3, "train", np.array([i]), task.train) for i in range(20)]
    assert [one.questions()[0] for one in alone] == whole.questions()[:20]
    assert [one.answers()[0] for one in alone] == whole.answers()[:20]
    size[5:] = task.ood[0]
    beside = task.batch(3, "train", np.arange(40), size)
    assert beside.questions()[:5] == whole.questions()[:5]
    assert beside.answers()[:5] == whole.answers()[:5]


@every
def test_all_splits_have_items_at_all_training_sizes(task):
    low, high = task.train
    for split in ("train", "valid", "test"):
        sizes = np.arange(low, high + 1)
        assert np.array_equal(task.batch(0, split, sizes - low, sizes).size, sizes)


@every
def test_guessing_the_commonest_answer_is_no_better_than_twice_chance(task):
    for size in task.iid[-2:]:
        if task.chance(size) > 0.02:
            assert majority(draw(task, size, 2000).answers()) < max(2 * task.chance(size), 0.25) * 0.9, size


@every
def test_longest_answers_are_reached(task):
    size = task.iid[0]
    longest = max(map(len, draw(task, size, 2000).answers()))
    if task.kind in ("prefix_sums", "sort_then_scan"):  # the longest list of all is too rare
        assert 0.85 * task.max_answer(size) <= longest <= task.max_answer(size)
    else:
        assert longest == task.max_answer(size)


@every
def test_docstring_draws_examples(task):
    told = " ".join(type(task).__doc__.split())
    drawn = re.findall(r"``([^`]+=)`` -> ``([^`]+)``", told)
    assert drawn
    if task == type(task)():
        assert all(task.solve(question) == answer for question, answer in drawn)
    assert "Size is " in told
    assert "Source:" in told
    assert "Differs from" in told


def test_no_alphabet_has_a_letter_in_both_cases():
    ours = [TASKS.get(name) for name in TASKS.names() if TASKS.get(name).__module__.startswith("stepladder.")]
    symbols = set("".join(task.alphabet for task in ours))
    assert len({symbol.casefold() for symbol in symbols}) == len(symbols)


def test_questions_say_which_task_they_are_of():
    questions = {t.kind: set(draw(t, t.train, 2000).questions()) for t in VARIANTS[: len(TASKS.names())]}
    seen = Counter(question for asked in questions.values() for question in asked)
    assert seen.most_common(1)[0][1] == 1


def test_parity_labels_are_balanced_and_neither_length_nor_first_bit_tells():
    drawn = draw(Parity(), (4, 16), 4000)
    odd = np.array([answer == "1" for answer in drawn.answers()])
    first = np.array([question[0] == "1" for question in drawn.questions()])
    assert odd.mean() == pytest.approx(0.5, abs=0.03)
    assert odd[first].mean() == pytest.approx(0.5, abs=0.05)
    assert odd[drawn.size == 16].mean() == pytest.approx(0.5, abs=0.12)


def test_addition_carries_are_balanced_and_travel_far():
    carries, longest, shorter = [], [], []
    for question in draw(Addition(), 10, 1500).questions():
        a, b = (text[::-1] for text in question.rstrip("=").split("+"))
        shorter.append(min(len(a), len(b)))
        carry, ripple, far = 0, 0, 0
        for x, y in zip(a, b, strict=False):
            total = int(x) + int(y)
            ripple = ripple + 1 if carry and total == 9 else 0
            far, carry = max(far, ripple), int(total + carry > 9)
            carries.append(carry)
        longest.append(far)
    assert np.mean(carries) == pytest.approx(0.47, abs=0.05)
    assert np.mean(np.array(longest) >= 3) > 0.05  # uniform digits: 0.2 %
    assert max(longest) >= 6
    assert np.bincount(shorter)[1:].min() > 100  # all lengths of the other operand, uniformly


@pytest.mark.parametrize("size", [3, 8, 40])
def test_chain_carries_over_its_whole_run_in_half_of_the_items(size):
    drawn = draw(Chain(), size, 1000)
    starts = [question.split(">")[0] for question in drawn.questions()]
    rippled = [answer[:-(2)] != start[:-2] for start, answer in zip(starts, drawn.answers(), strict=True)]
    assert np.mean(rippled) == pytest.approx(0.5, abs=0.06)
    changed = [
        sum(x != y for x, y in zip(start.zfill(size + 1), answer.zfill(size + 1), strict=True))
        for start, answer in zip(starts, drawn.answers(), strict=True)
    ]
    assert max(changed) == size + 1
    assert np.mean(np.array(changed) > size // 2) > 0.2


def test_successor_carries_run_to_any_length():
    drawn = draw(Successor(), 12, 3000)
    nines = np.array([len(q[2:-1]) - len(q[2:-1].rstrip("9")) for q in drawn.questions()])
    assert (nines > 0).mean() == pytest.approx(0.55, abs=0.04)
    assert set(range(12)) <= set(nines.tolist())


def test_compare_labels_are_thirds_at_every_size_and_lengths_do_not_decide():
    for size in (2, 4, 9):
        drawn = draw(Compare(), size, 2400)
        answers = np.array(drawn.answers())
        for sign in "<>=":
            assert (answers == sign).mean() == pytest.approx(1 / 3, abs=0.04)
        pairs = [question.removesuffix("=").split("?") for question in drawn.questions()]
        guess = ["<" if len(a) < len(b) else ">" if len(a) > len(b) else "=" for a, b in pairs]
        assert np.mean(answers == guess) < 0.6
        leading = ["<" if a[0] < b[0] else ">" if a[0] > b[0] else "=" for a, b in pairs]
        assert np.mean(answers == leading) < 0.8
        near = [len(a) == len(b) and sum(x != y for x, y in zip(a, b, strict=True)) == 1 for a, b in pairs]
        assert np.mean(near) > 0.2
        assert np.mean([len(a) != len(b) for a, b in pairs]) == pytest.approx(1 / 6, abs=0.04)


def test_mod_add_wraps_half_of_the_time():
    pairs = [re.split(r"[+%=]", question)[:3] for question in draw(ModAdd(), 97, 2000).questions()]
    assert np.mean([int(a) + int(b) >= int(m) for a, b, m in pairs]) == pytest.approx(0.49, abs=0.04)


def counts(body: str) -> bool:
    return all(body.count(a) == body.count(b) for a, b in ("()", "[]", "{}"))


def depth_never_negative(body: str, types: str = "([{)]}") -> bool:
    half, depth = len(types) // 2, 0
    for bracket in body:
        depth += (bracket in types[:half]) - (bracket in types[half:])
        if depth < 0:
            return False
    return depth == 0


def each_type_never_negative(body: str) -> bool:
    return all(depth_never_negative(body, pair) for pair in ("()", "[]", "{}"))


def neighbours(body: str) -> bool:
    return not any(bad in body for bad in ("(]", "(}", "[)", "[}", "{)", "{]"))


@pytest.mark.parametrize("count_heuristic", [counts, depth_never_negative, each_type_never_negative, neighbours])
@pytest.mark.parametrize("task", [Dyck(), Dyck(types=3, depth=12)], ids=["two", "three"])
def test_dyck_is_not_solved_by_counting(task, count_heuristic):
    for size in (6, 12, 24):
        drawn = draw(task, size, 1000)
        guesses = ["y" if count_heuristic(question[2:-1]) else "n" for question in drawn.questions()]
        accuracy = np.mean([guess == answer for guess, answer in zip(guesses, drawn.answers(), strict=True)])
        assert accuracy == pytest.approx(0.5, abs=0.06), (size, count_heuristic.__name__)


def test_dyck_depth_is_capped_and_used_at_every_length():
    for size in (12, 48):
        deepest = []
        for question in draw(Dyck(), size, 200).questions():
            depths = np.cumsum([1 if bracket in "([{" else -1 for bracket in question[2:-1]])
            deepest.append(depths.max())
        assert max(deepest) == 6
        assert min(deepest) >= 3


def test_recall_keys_differ_and_queries_come_from_everywhere():
    drawn = draw(Recall(), 12, 500)
    places = Counter()
    for question in drawn.questions():
        pairs, queries = question[2:-1].split("?")
        keys = pairs[0::2]
        assert len(set(keys)) == 12
        assert len(set(queries)) == len(queries) == 4
        places.update(keys.index(query) for query in queries)
    assert min(places[place] for place in range(12)) > 100  # 167 expected


def test_recall_order_of_pairs_is_no_new_question():
    one = Examples(*(np.frombuffer(b, np.uint8)[None] for b in (b"k:a1b2c3?ba=", b"21")), np.array([3]))
    two = Examples(*(np.frombuffer(b, np.uint8)[None] for b in (b"k:c3a1b2?ba=", b"21")), np.array([3]))
    assert (Recall().canonical(one) == Recall().canonical(two)).all()


def test_chain_order_of_steps_is_no_new_question():
    one = Examples(*(np.frombuffer(b, np.uint8)[None] for b in (b"995>1>9=", b"1005")), np.array([3]))
    two = Examples(*(np.frombuffer(b, np.uint8)[None] for b in (b"995>9>1=", b"1005")), np.array([3]))
    assert (Chain(steps=2).canonical(one) == Chain(steps=2).canonical(two)).all()


@pytest.mark.parametrize(("group", "order"), [("S3", 6), ("S5", 120)])
def test_state_tracking_moves_generate_the_whole_group(group, order):
    moves = StateTracking(group=group).moves
    reached = {tuple(range(len(moves[0])))}
    frontier = set(reached)
    while frontier:
        frontier = {tuple(cups[place] for place in move) for cups in frontier for move in moves} - reached
        reached |= frontier
    assert len(reached) == order
    answers = draw(StateTracking(group=group), 8, 3000).answers()
    assert len(set(answers)) == order
    assert majority(answers) < 1.6 / order


@pytest.mark.parametrize("size", [1, 3, 6, 24])
def test_listops_answers_are_spread_and_operators_all_occur(size):
    drawn = draw(ListOps(), size, 1000)
    assert majority(drawn.answers()) < 0.2
    assert len(set(drawn.answers())) == 10
    used = Counter("".join(drawn.questions()))
    assert min(used[operator] for operator in "xnms") > 0.2 * size * 1000


PROGRAMS = [task for task in VARIANTS if task.complexity]


@pytest.mark.parametrize("task", PROGRAMS, ids=lambda task: task.kind)
def test_programs_declare_a_complexity_and_are_x_and_y(task):
    assert re.match(r"O\(.+\) (time|steps)", task.complexity)
    drawn = draw(task, task.train, 200)
    for question, answer in zip(drawn.questions(), drawn.answers(), strict=True):
        x, y = record(question, answer)
        assert re.match(r"[a-z]+=\S", x)
        assert not x.endswith("=")
        assert question.startswith(x)
        assert y.endswith(answer)
        assert question_of(x, y) == (question, answer)


def test_programs_of_the_source_have_its_surface_forms():
    for name, x, y in (
        ("scan_reduce", r"op=(sum|max|min|xor); arr=-?\d+(,-?\d+)*", r"-?\d+"),
        ("prefix_sums", r"arr=-?\d+(,-?\d+)*", r"prefix=-?\d+(,-?\d+)*"),
        ("sort_then_scan", r"arr=-?\d+(,-?\d+)*", r"rle=-?\d+:\d+(,-?\d+:\d+)*"),
        ("nested_loop_count", r"target=-?\d+; arr=-?\d+(,-?\d+)*", r"\d+"),
        ("dp_table_stripe", r"s=[a-d]+; t=[a-d]+", r"dist=\d+"),
    ):
        drawn = draw(TASKS.get(name)(), (1 if name in ("scan_reduce", "prefix_sums") else 2, 20), 200)
        for made in map(record, drawn.questions(), drawn.answers()):
            assert all(re.fullmatch(form, text) for form, text in zip((x, y), made, strict=True)), made


def test_numbers_of_arrays_are_uniform_in_their_range():
    drawn = draw(ScanReduce(low=-3, high=6), (4, 16), 1500)
    numbers = Counter(n for q in drawn.questions() for n in re.findall(r"-?\d+", q.split("arr=")[1]))
    assert set(numbers) == {str(n) for n in range(-3, 7)}
    counts = np.array(list(numbers.values()))
    assert (np.abs(counts - counts.mean()) < 5 * counts.mean() ** 0.5).all()
    with pytest.raises(ValueError, match="low = 3 must be below high = 3"):
        ScanReduce(low=3, high=3)


def test_edit_distances_are_spread_and_strings_share_something():
    for size in (16, 64, 65, 130):
        drawn = draw(DpTableStripe(), size, 400)
        share = np.array([int(answer) / size for answer in drawn.answers()])
        assert (share < 0.2).mean() > 0.05
        assert (share > 0.5).mean() > 0.1
        assert majority(drawn.answers()) < 0.2
        assert [DpTableStripe().solve(q) for q in drawn.questions()] == drawn.answers()


def test_no_pair_of_strings_or_numbers_is_asked_in_both_orders():
    for task, ordered in ((DpTableStripe(), lambda a, b: (-len(a), a) <= (-len(b), b)), (TASKS.get("gcd")(), None)):
        for question in draw(task, task.train, 1000).questions():
            a, b = (part.split("=")[1] for part in question.split("; ")[:2])
            assert ordered(a, b) if ordered else int(a) >= int(b)


def test_pairs_that_add_up_are_found_in_most_items():
    for size in (8, 16, 64):
        counts = np.array([int(answer) for answer in draw(NestedLoopCount(), size, 1000).answers()])
        assert (counts == 0).mean() < 0.35
        assert len(set(counts.tolist())) > size


def test_majorities_are_held_or_missed_closely():
    drawn = draw(TASKS.get("majority")(), 15, 2000)
    none = np.array([answer == "none" for answer in drawn.answers()])
    most = np.array([Counter(q[4:-11].split(",")).most_common(1)[0][1] for q in drawn.questions()])
    assert 0.2 < none.mean() < 0.4
    assert ((most >= 8) == ~none).all()
    assert (most[none] >= 6).mean() > 0.4


def test_divisors_have_all_numbers_of_digits():
    digits = np.array([len(answer) for answer in draw(TASKS.get("gcd")(), 6, 3000).answers()])
    assert np.bincount(digits)[1:].min() > 300


def test_a_wrong_product_is_wrong_in_one_entry():
    for question, answer in zip(*(lambda d: (d.questions(), d.answers()))(draw(TASKS.get("freivalds")(), 3, 300))):
        a, b, c = (
            np.array([row.split(",") for row in part.split("=")[1].split("/")], int)
            for part in question.split("; ")[:3]
        )
        assert np.count_nonzero(a @ b != c) == (answer == "n")
        assert (c >= 0).all()


def claims(task: Claim, size: int, n: int = 3000) -> tuple[list[str], np.ndarray]:
    drawn = draw(task, size, n)
    return drawn.questions(), np.array(drawn.answers()) == "y"


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_right_and_wrong_claims_are_equally_many(split):
    for task in (Freivalds(), MillerRabin()):
        for size in (*task.iid, *task.ood):
            right = np.array(draw(task, size, 3000, split).answers()) == "y"
            assert right.mean() == pytest.approx(0.5, abs=0.04), (task.kind, size)


@pytest.mark.parametrize("task", [Freivalds(), MillerRabin()])
def test_random_symbols_change_neither_the_claim_nor_its_split(task):
    more = type(task)(rounds=2)
    for split in ("train", "test"):
        plain, given = (draw(t, task.iid[1], 300, split) for t in (task, more))
        cut = [re.sub(r"; [rw]=[0-9,/]+", "", question) for question in given.questions()]
        assert (cut, given.answers()) == (plain.questions(), plain.answers())
        assert task.fingerprints(plain).tolist() == more.fingerprints(given).tolist()


@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_checking_products_errs_on_one_side_and_half_as_often_with_every_vector(rounds):
    task = Freivalds(rounds=rounds)
    questions, right = claims(task, 3)
    accepted = np.array([task.accepts(question) for question in questions])
    assert accepted[right].all()
    assert accepted[~right].mean() == pytest.approx(2.0**-rounds, abs=0.04)
    assert all(map(Freivalds().accepts, claims(Freivalds(), 3, 20)[0]))


def test_checking_primes_errs_on_one_side_and_a_sixth_to_a_quarter_of_the_numbers_lie_about_a_product():
    task = MillerRabin(rounds=1)
    for size in (6, 12):
        questions, right = claims(task, size, 2000)
        accepted = np.array([task.accepts(question) for question in questions])
        assert accepted[right].all()
        assert accepted[~right].mean() < 0.1
    n = int(_products(5)[0])
    liars = np.mean([task.accepts(f"n={n}; w={base}; prime=") for base in range(2, n - 1)])
    assert 1 / 6 < liars <= 1 / 4
    twice = np.mean([MillerRabin(rounds=2).accepts(f"n={n}; w={b},{n // 2 - b}; prime=") for b in range(2, n // 2 - 2)])
    assert twice < liars


def test_primes_are_those_of_the_sieve_and_pseudoprimes_are_none():
    odd = np.arange(1, 200_001, 2)
    assert odd[_is_prime(odd)].tolist() == _primes(200_000)[1:].tolist()
    assert not _is_prime(np.array([2047, 1_373_653, 25_326_001, 3_215_031_751, 0, 1])).any()  # strong to 2, 3, 5, 7
    assert _is_prime(np.array([999_999_999_989])).all()


def test_the_check_of_many_numbers_at_once_is_that_of_python():
    odd = 10**12 - 1 - 2 * np.arange(3000)
    odd = np.concatenate([odd, _products(12)[-500:], np.arange(13, 999, 2)])
    for base in (2, 3, 5, 7, 11):
        assert _strong(odd, base).tolist() == [_passes(n, base) for n in odd.tolist()]


def test_composites_have_no_small_factor_and_the_hard_ones_are_among_them():
    questions, right = claims(MillerRabin(), 12, 4000)
    wrong = np.array([int(q[2:].split(";")[0]) for q in questions])[~right]
    assert all((wrong % p != 0).all() for p in _primes(47))
    assert np.isin(wrong, _products(12)).mean() == pytest.approx(0.18, abs=0.04)


@pytest.mark.parametrize(
    ("kind", "wrong", "right"),
    [
        ("freivalds", "a=2; b=3; c=7; equal=", "a=2; b=3; c=6; equal="),
        ("miller_rabin", "n=49141; prime=", "n=10007; prime="),
    ],
)
def test_false_accepts_and_false_rejects_are_marked_apart(kind, wrong, right):
    task = TASKS.get(kind)()
    assert [task.marks(wrong, said) for said in "yn"] == [{"false_accept": 1.0}, {"false_accept": 0.0}]
    assert [task.marks(right, said) for said in "yn"] == [{"false_reject": 0.0}, {"false_reject": 1.0}]
    assert task.marks(right, "no") == {"false_reject": 0.0}


def test_repetitions_are_uniform():
    times = Counter(question[-2] for question in draw(TASKS.get("repeat_copy")(), 6, 1500).questions())
    assert set(times) == set("123")
    assert min(times.values()) > 420


def test_lists_are_marked_by_element():
    for name, question, answer in (
        ("prefix_sums", "arr=3,-1,4; prefix=", "3,2,6"),
        ("sort_then_scan", "arr=3,-1,3; rle=", "-1:1,3:2"),
    ):
        task, many = TASKS.get(name)(), answer.count(",") + 1
        assert task.marks(question, answer) == {"elements": 1.0}
        assert task.marks(question, answer[:-1] + "7") == pytest.approx({"elements": 1 - 1 / many})
        assert task.marks(question, answer + ",5") == {"elements": many / (many + 1)}
        assert task.marks(question, "") == {"elements": 0.0}
    assert TASKS.get("scan_reduce")().marks("op=sum; arr=1,2=", "3") == {}
