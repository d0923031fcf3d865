"""One-line specifications: what they split into, which names they reach, how they refuse."""

from __future__ import annotations

import pytest

from layerlens.errors import ConfigError, LayerlensError, UnknownNameError, closest
from layerlens.specs import call_factory, is_factory, parse_spec


@pytest.mark.parametrize(
    ("text", "kind", "argument", "options"),
    [
        ("digits", "digits", "", {}),
        ("  mlp ", "mlp", "", {}),
        ("mlp,width=8,depth=2", "mlp", "", {"width": 8, "depth": 2}),
        ("npz:/data/a,b.npz", "npz", "/data/a,b.npz", {}),
        ("npz:/data/a,b.npz,normalize=none", "npz", "/data/a,b.npz", {"normalize": "none"}),
        ("npz:C:\\data\\x.npz", "npz", "C:\\data\\x.npz", {}),
        ("torchvision:resnet18,weights=DEFAULT", "torchvision", "resnet18", {"weights": "DEFAULT"}),
        ("pkg.mod:make,rate=0.5,flag=true,off=False", "pkg.mod", "make", {"rate": 0.5, "flag": True, "off": False}),
    ],
)
def test_parse_spec_splits_kind_argument_and_options(text, kind, argument, options):
    spec = parse_spec(text)
    assert (spec.kind, spec.argument, spec.options) == (kind, argument, options)


def test_parse_spec_keeps_the_text_as_typed():
    assert parse_spec("mlp,width=8").text == "mlp,width=8"


def test_parse_spec_keeps_the_order_of_options():
    assert list(parse_spec("m,c=1,a=2,b=3").options) == ["c", "a", "b"]


@pytest.mark.parametrize(
    ("value", "expected"), [("3", 3), ("-3", -3), ("0.5", 0.5), ("1e-3", 1e-3), ("TRUE", True), ("V1", "V1")]
)
def test_option_values_take_the_narrowest_type(value, expected):
    found = parse_spec(f"m,x={value}").options["x"]
    assert found == expected
    assert type(found) is type(expected)


def test_check_options_passes_what_is_allowed():
    parse_spec("mlp,width=8").check_options(["width", "depth"])


def test_check_options_names_the_closest_option():
    with pytest.raises(ConfigError, match=r"'mlp,widht=8' has no option 'widht'; closest: width"):
        parse_spec("mlp,widht=8").check_options(["width", "depth"])


def test_check_options_says_when_there_are_none():
    with pytest.raises(ConfigError, match="it takes none"):
        parse_spec("digits,size=8").check_options([])


@pytest.mark.parametrize("text", ["pkg:make", "pkg.sub:make", "_p.m1:_make", "pkg:make,width=3"])
def test_is_factory_accepts_a_module_and_a_name(text):
    assert is_factory(parse_spec(text))


@pytest.mark.parametrize("text", ["mlp", "pkg.mod", "./file.py:make", "a-b:make", "pkg:", "pkg:make.other", ":make"])
def test_is_factory_refuses_everything_else(text):
    assert not is_factory(parse_spec(text))


def test_call_factory_passes_the_options(tmp_path, monkeypatch):
    (tmp_path / "specs_ok.py").write_text("def make(size):\n    return size + 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert call_factory(parse_spec("specs_ok:make"), {"size": 40}) == 41


def test_call_factory_names_a_module_that_is_not_there():
    with pytest.raises(UnknownNameError, match=r"can't import 'no_such_module_42' for 'no_such_module_42:make'"):
        call_factory(parse_spec("no_such_module_42:make"), {})


def test_call_factory_names_the_closest_callable(tmp_path, monkeypatch):
    (tmp_path / "specs_near.py").write_text("NUMBER = 1\ndef make_model():\n    return 41\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UnknownNameError, match=r"specs_near has no callable 'make_mdel'; closest: make_model"):
        call_factory(parse_spec("specs_near:make_mdel"), {})
    with pytest.raises(UnknownNameError, match="no callable 'NUMBER'"):
        call_factory(parse_spec("specs_near:NUMBER"), {})


def test_call_factory_tells_what_failed(tmp_path, monkeypatch):
    (tmp_path / "specs_broken.py").write_text("1 / 0\n")
    (tmp_path / "specs_picky.py").write_text("def make(size):\n    return size\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="importing 'specs_broken' failed: ZeroDivisionError"):
        call_factory(parse_spec("specs_broken:make"), {})
    with pytest.raises(ConfigError, match=r"'specs_picky:make' failed: TypeError: .*unexpected keyword argument 'siz'"):
        call_factory(parse_spec("specs_picky:make"), {"siz": 3})


def test_a_typo_before_the_colon_gets_the_closest_kinds():
    with pytest.raises(UnknownNameError, match="closest: cifar1"):
        call_factory(parse_spec("cifar11:data"), {}, ["cifar10", "cifar100", "digits"])


def test_closest_falls_back_to_what_is_allowed():
    assert closest("zzz", ["train", "test"]) == "allowed: train, test"


def test_unknown_name_is_a_key_error_whose_message_is_not_quoted():
    error = UnknownNameError("no 'x'")
    assert isinstance(error, KeyError)
    assert isinstance(error, LayerlensError)
    assert str(error) == "no 'x'"
