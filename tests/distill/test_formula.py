"""Reading, checking, printing and the canonical form of formulas."""

from __future__ import annotations

import random

import pytest

from autodet.distill.distances import DISTANCES
from autodet.distill.formula import INPUTS, Formula, FormulaError, Op, Term
from autodet.distill.grammar import random_formula
from autodet.distill.transforms import TRANSFORMS


def canonical(text: str) -> str:
    return str(Formula.parse(text).canonical())


def test_parse_gives_the_parts_in_order() -> None:
    formula = Formula.parse("global: catt(t=0.7) > pool(2) > norm(n) | l1 * 6; logits.roi: softmax(c, t=2) | kl")
    first = Term(
        "global",
        (Op("catt", (("t", 0.7),)), Op("pool", (("k", 2),)), Op("norm", (("axis", "n"),))),
        Op("l1"),
        6.0,
    )
    second = Term("logits.roi", (Op("softmax", (("axis", "c"), ("t", 2.0))),), Op("kl"), 1.0)
    assert formula.terms == (first, second)
    assert formula.inputs == ("global", "logits.roi")
    assert str(formula) == "global: catt(0.7) > pool(2) > norm(n) | l1 * 6; logits.roi: softmax(c, t=2) | kl * 1"


def test_what_is_remembered_of_a_text_changes_nothing() -> None:
    rng = random.Random(0)
    for _ in range(50):
        formula = random_formula(tuple(INPUTS), rng)
        fresh = Formula(tuple(Term(t.input, t.transforms, t.distance, t.weight) for t in formula.terms))
        again = Formula.parse(str(formula))
        assert again == formula == fresh and str(fresh) == str(again)
        assert fresh.canonical() == formula.canonical() and fresh.key == again.key
        canonical = again.canonical()
        assert canonical.canonical() is canonical and all(term.canonical() is term for term in canonical.terms)
    Formula.parse("global: l2 * 2; logits.roi: l1")
    with pytest.raises(FormulaError, match=r"Term 2, character 17: unknown input 'logits\.rpn'"):
        Formula.parse("global: l2 * 2; logits.rpn: l1")
    for text in ("global: l2 * 2; none", "global: l2 * 2;; logits.roi: l1", "global: pool(2; 3) | l2", ""):
        with pytest.raises(FormulaError):
            Formula.parse(text)


def test_numbers_keep_their_type_in_the_canonical_form() -> None:
    typed = Op("pool", (("k", 2),))
    for op in (Op("pool", (("k", 2.0),)), typed):
        (term,) = Formula((Term("global", (op,), Op("l1"), 1),)).canonical().terms
        assert term.transforms == (typed,) and type(term.weight) is float
        assert [type(value) for _, value in term.transforms[0].params] == [int]


def test_names_of_parameters_and_layout_do_not_matter() -> None:
    named = Formula.parse("global: catt(t=0.5) > pool(k=2) > norm(axis=n) | l1 * 6.0;")
    terse = Formula.parse("global:catt>pool(2)>\n norm(n)|l1*6")
    assert named.key == terse.key == "v2 global: catt > pool(2) > norm(n) | l1 * 6"
    assert Formula.parse("global: softmax(t=2, axis=hw) | kl") == Formula.parse("global: softmax(hw, 2) | kl * 1e0")
    assert Formula.parse("global: | l2") == Formula.parse("global: l2 * 1")


def test_the_empty_formula_is_called_none() -> None:
    assert Formula.parse(" none ") == Formula()
    assert str(Formula()) == "none"
    assert Formula().key == "v2 none"
    assert (Formula().min_batch, Formula().batch_dependent, Formula().inputs) == (1, False, ())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("global: softmax(c, t=1.0) | kl", "global: softmax(c) | kl"),
        ("global: l2 * 1; logits.roi: l1 * 2", "logits.roi: l1 * 2; global: l2 * 1"),
        ("global: l2 * 0; logits.roi: l1", "logits.roi: l1"),
        ("global: l2 * 0", "none"),
        ("global: pool(1) | l2", "global: l2"),
        ("global: mask(1) > power(1) > norm(c) | l2", "global: norm(c) | l2"),
        ("global: abs > abs | l1", "global: abs | l1"),
        ("global: abs > pool(1) > abs | l1", "global: abs | l1"),
        ("global: l2 * 0.1; global: pool(1) | l2 * 0.2", "global: l2 * 0.3"),
        ("global: cosine(c)", "global: cosine"),
        ("global: l2 * 1e1", "global: l2 * 10"),
    ],
)
def test_equal_meaning_gives_an_equal_key(one: str, other: str) -> None:
    assert Formula.parse(one).key == Formula.parse(other).key


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("global: l2", "global: l1"),
        ("global: l2", "logits.dense: l2"),
        ("global: l2 * 1", "global: l2 * 2"),
        ("global: norm(c) > abs | l2", "global: abs > norm(c) | l2"),
        ("global: softmax(c) | kl", "global: softmax(c, t=2) | kl"),
        ("global: affine > affine | l2", "global: affine | l2"),
        ("global: softmax(c) | l1", "global: log_softmax(c) | l1"),
    ],
)
def test_other_meaning_gives_another_key(one: str, other: str) -> None:
    assert Formula.parse(one).key != Formula.parse(other).key


def test_canonical_text_is_minimal() -> None:
    assert canonical("logits.roi: softmax(axis=c, t=2) | kl * 4.0; global: ssim(window=7) * 0.50") == (
        "global: ssim * 0.5; logits.roi: softmax(c, t=2) | kl * 4"
    )


def test_1000_random_formulas_survive_printing_and_parsing() -> None:
    rng = random.Random(0)
    for _ in range(1000):
        formula = random_formula(tuple(INPUTS), rng)
        assert Formula.parse(str(formula)) == formula
        assert formula.canonical() == formula
        shuffled = Formula(tuple(rng.sample(formula.terms, len(formula.terms))))
        assert shuffled.key == formula.key


def test_numbers_print_so_that_they_read_back() -> None:
    for weight in (6.0, 0.1, 1e-7, 1e20, 1 / 3, 123456789.0):
        term = Term("global", (), Op("l2"), weight)
        assert Formula.parse(str(term)).terms == (term,)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["empty", "'none'"]),
        ("global", ["Term 1", "character 7", "expected ':'", "the end of the formula"]),
        ("global: l1; global: cat | l1", ["Term 2", "character 21", "unknown transform 'cat'", "Did you mean catt"]),
        ("globl: l1", ["Term 1", "character 1", "unknown input 'globl'", "Did you mean global"]),
        ("global: ll", ["unknown distance 'll'", "Did you mean l", "smooth_l1"]),
        ("global: l1 | l1", ["'l1'", "It is a distance"]),
        ("global: catt", ["'catt'", "It is a transform"]),
        ("global: catt > norm(c)", ["expected '|' and a distance", "the end"]),
        ("global: norm | l1", ["norm needs its parameter 'axis'", "Usage: norm(axis)"]),
        ("global: norm(q) | l1", ["'axis' of norm", "expected an axis (n, c, hw, chw, nhw)", "'q'"]),
        ("global: norm(c, 1) | l1", ["character 17", "at most 1"]),
        ("global: pool(2.5) | l1", ["'k' of pool", "a whole number from 1 to 16", "2.5"]),
        ("global: patch(1) | l1", ["'p' of patch", "from 2 to 16", "found 1"]),
        ("global: softmax(c, t=0) | kl", ["'t' of softmax", "from 0.01 to 100", "found 0"]),
        ("global: softmax(c, tau=2) | kl", ["no parameter 'tau'", "Usage: softmax(axis, t=1)"]),
        ("global: pool(k=2, k=3) | l1", ["'k' twice"]),
        ("global: softmax(t=2, c) | kl", ["without a name follows"]),
        ("global: norm(c | l1", ["expected ',' or ')'", "found '|'"]),
        ("global: l1 % 2", ["Character 12", "'%'"]),
        ("global: l1 * x", ["a number such as 0.5", "found 'x'"]),
        ("global: l1 * nan", ["expected a weight", "found 'nan'"]),
        ("global: l1 * -1", ["Term 1", "at least 0", "-1"]),
        ("global: l1 * 1e999", ["finite weight", "inf"]),
        ("global: l1 l2", ["character 12", "expected", "found 'l2'"]),
        ("global: kl", ["distance 'kl' is not defined on a map", "Valid on a map: l1, l2"]),
        ("logits.roi: norm(hw) | l1", ["'norm(hw)' works along hw", "a vector does not have", "Valid: n, c"]),
        ("logits.roi: pool(2) | l1", ["'pool(2)' is not defined on a vector", "catt"]),
        ("global: mean(c) > norm(c) | l1", ["a plane does not have", "Valid: n, hw, nhw"]),
        ("global: mean(hw) | ssim", ["'ssim' is not defined on a vector"]),
        ("global: mean(nhw) | l1", ["expected an axis (c, hw)"]),
        ("global: softmax(c) > abs | l1", ["not defined on a distribution over a map", "no transform"]),
        ("localization.roi: norm(c) | l1", ["'norm(c)' is not defined on a list of boxes", "no transform"]),
        (
            "localization.dense: ssim",
            ["'ssim' is not defined on a list of boxes", "Valid on a list of boxes: l1", "giou"],
        ),
        ("global: giou", ["distance 'giou' is not defined on a map"]),
        ("logits.rpn: l1", ["unknown input 'logits.rpn'", "Did you mean logits.roi or logits.dense"]),
    ],
)
def test_errors_say_which_term_why_and_what_would_be_valid(text: str, parts: list[str]) -> None:
    with pytest.raises(FormulaError) as error:
        Formula.parse(text)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("term", "part"),
    [
        (Term("global", (), Op("l1"), float("nan")), "finite weight"),
        (Term("global", (Op("norm", (("axis", "z"),)),), Op("l1")), "expected an axis"),
        (Term("global", (Op("pool", (("k", "big"),)),), Op("l1")), "a whole number"),
        (Term("global", (Op("catt", (("t", True),)),), Op("l1")), "a number"),
        (Term("global", (Op("catt", (("temperature", 1.0),)),), Op("l1")), "no parameter 'temperature'"),
        (Term("nowhere", (), Op("l1")), "unknown input"),
        (Term("global", (Op("pool"),), Op("l1")), "needs its parameter 'k'"),
    ],
)
def test_formulas_made_in_code_are_checked_too(term: Term, part: str) -> None:
    with pytest.raises(FormulaError, match=f"Term 2: .*{part}"):
        Formula((Term("global", (), Op("l1")), term)).validate()
    with pytest.raises(FormulaError, match=part):
        _ = Formula((term,)).key


@pytest.mark.parametrize(
    ("text", "min_batch", "dependent"),
    [
        ("global: l2", 1, False),
        ("global: norm(c) | pearson(chw)", 1, False),
        ("global: standardize(nhw) | l2", 1, True),
        ("global: norm(n) | l1", 2, True),
        ("global: batt | l1", 2, True),
        ("global: softmax(n) | kl", 2, True),
        ("global: cosine(n)", 2, True),
        ("global: standardize(n) | l2", 3, True),
        ("global: crosscorr", 3, True),
        ("global: pearson(n); logits.roi: l2", 3, True),
    ],
)
def test_what_looks_along_the_batch_says_so(text: str, min_batch: int, dependent: bool) -> None:
    formula = Formula.parse(text)
    assert (formula.min_batch, formula.batch_dependent) == (min_batch, dependent)


def test_the_language_is_as_large_as_promised() -> None:
    assert not set(TRANSFORMS) & set(DISTANCES)  # a name means one thing
    assert len(TRANSFORMS) >= 12
    assert len(DISTANCES) >= 6
    assert {spec.slot for spec in TRANSFORMS.values()} == {"A", "B", "C"}
