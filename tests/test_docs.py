"""What the documentation says is so."""

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

import layerlens as ll
from layerlens.cli import cli
from layerlens.experiments.engines import ENGINES
from layerlens.experiments.study import SCALES, WORDS, Arm, Drawing, Measure, Study, make_study, study_names
from layerlens.graph_models import GRAPH_MODELS
from layerlens.models import FAMILIES
from layerlens.training.config import TABLES, make_config, parse_config
from layerlens.training.recipes import recipe_names

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("name", ll.__all__)
def test_every_public_name_exists_and_is_documented(name):
    assert name == "MEASURES" or getattr(ll, name).__doc__
    assert f"`ll.{name}" in DOCS["api.md"]


def test_importing_layerlens_imports_neither_torch_nor_matplotlib():
    code = "import sys, layerlens; assert not {'torch', 'matplotlib', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_readme_opens_with_the_two_commands_and_ci_runs_the_second():
    first = blocks(README, "sh")[0].splitlines()
    assert [line.split("#")[0].strip() for line in first] == ["make demo", "make test"]
    assert "make test" in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize("name", ["README.md", *DOCS])
def test_the_python_of_the_docs_runs(name, monkeypatch, capsys):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    for code in blocks(README if name == "README.md" else DOCS[name], "python"):
        exec(compile(code, name, "exec"), {})


def test_the_table_of_measures_in_the_docs_is_the_registry():
    rows = [re.split(r" *\| *", line)[1:8] for line in DOCS["similarity.md"].splitlines() if line.startswith("| `")]
    for cells, measure in zip(rows, ll.MEASURES.values(), strict=True):
        name, about, span, higher, invariances, options, source = cells
        assert (name, about, higher, source) == (f"`{measure.name}`", measure.about, measure.higher, measure.source)
        assert invariances.split(", ") == list(measure.invariances)
        given = [f"`{key}={value}`" for key, value in measure.options.items() if key != "estimator"]
        assert options == ", ".join(given)
        assert span.startswith(f"from {measure.low:.4g}")


def test_the_readme_names_every_command_and_only_commands_that_exist():
    named = set(re.findall(r"`layerlens (\w+)", README))
    assert named == set(cli.commands)


@pytest.mark.parametrize(
    "line",
    [
        line
        for block in (*blocks(README, "sh")[2:], *blocks(DOCS["studies.md"], "sh"))
        for line in block.replace("\\\n", "").splitlines()
    ],
)
def test_the_options_in_the_readme_and_the_docs_exist(line):
    _, name, *words = line.partition("#")[0].split()
    command = cli.commands[name]
    while isinstance(command, click.Group):
        name, *words = words
        command = command.commands[name]
    known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
    assert {word for word in words if word.startswith("--")} <= known


def test_the_study_file_of_the_docs_is_accepted_and_names_every_field():
    (text,) = blocks(DOCS["studies.md"], "toml")
    content = parse_config(text, "studies.md")
    made = make_study({"name": "sweep", **content})
    assert len(made.arms) == 2
    assert {"name", "scales", *content} == set(Study.model_fields)
    for kind, holders in ((Arm, content["arms"]), (Drawing, content["figures"]), (Measure, [content["measure"]])):
        assert {field for holder in holders for field in holder} >= set(kind.model_fields) - {
            "protocol",
            "arms",
            "transfer",
        }


def test_the_docs_name_every_scale_word_and_engine():
    text = DOCS["studies.md"]
    assert all(f"`{word}`" in text or f'"{word}"' in text for word in (*WORDS, *ENGINES))
    assert all(f"[scales.{scale}]" in text for scale in SCALES)
    assert set(re.findall(r"study run ([a-z][\w-]+)(?= )", text + README)) <= set(study_names())


def settings_of_the_docs() -> list[dict[str, Any]]:
    return [parse_config(block, "training.md") for block in blocks(DOCS["training.md"], "toml")]


def test_the_settings_files_of_the_docs_are_accepted():
    files = settings_of_the_docs()  # four, as MoCo, AdaLASE, sentences and graphs exclude each other
    for settings in files:
        make_config(settings)
    assert {"init_sha256", "data_sha256"}.union(*files) == set(ll.RunConfig.model_fields)


@pytest.mark.parametrize("table", TABLES)
def test_the_settings_files_of_the_docs_name_every_field_of_a_table(table):
    everything, moco, text, graph = settings_of_the_docs()
    filled_in = {"dev_sha256", "model_sha256"}
    assert set({**everything, **moco, **text, **graph}[table]) == set(TABLES[table].model_fields) - filled_in


def test_the_settings_file_of_the_docs_for_sentences_holds_the_defaults():
    settings, usual = settings_of_the_docs()[2], make_config({"objective": "simcse"}).model_dump(mode="json")
    own = {"pooling", "max_length", "model_dropout", "dev", "dev_every"}  # left out by default
    assert {key: value for key, value in settings["text"].items() if key not in own}.items() <= usual["text"].items()
    assert {key: value for key, value in settings.items() if key != "text"}.items() <= usual.items()


def test_the_settings_file_of_the_docs_for_graphs_holds_the_defaults():
    settings = settings_of_the_docs()[3]
    usual = make_config({"objective": "graphcl"}).model_dump(mode="json")
    assert settings.items() <= usual.items()


def test_the_settings_file_of_the_docs_holds_the_defaults_but_where_it_says_so():
    settings, usual = settings_of_the_docs()[0], ll.RunConfig().model_dump(mode="json")
    own = {"train_samples", "epoch_samples", "init", *TABLES}
    assert {key: value for key, value in settings.items() if key not in own} == {
        key: value for key, value in usual.items() if key in settings and key not in own
    }
    assert make_config({"views": settings["views"]}).views == make_config({"views": {}}).views
    assert make_config({"adalase": settings["adalase"]}).adalase == make_config({"adalase": {}}).adalase
    assert (
        make_config({"augment": settings["augment"]}).augment == make_config({"augment": {"layer": "layer4"}}).augment
    )


def test_recipes_that_the_docs_name_exist():
    text = "".join([README, *DOCS.values()])
    assert set(re.findall(r"--recipe ([a-z][\w-]+)", text)) <= set(recipe_names())


def test_every_model_family_and_figure_is_named_in_the_docs():
    assert all(f"`{family}`" in README for family in (*FAMILIES, *GRAPH_MODELS))
    everything = {**vars(ll.figures), **vars(ll.study_figures)}
    drawn = {name for name, value in everything.items() if name[0] != "_" and is_own_function(value)}
    assert all(f"`{name}`" in DOCS["api.md"] for name in drawn)


def is_own_function(value: object) -> bool:
    return inspect.isfunction(value) and value.__module__ in ("layerlens.figures", "layerlens.study_figures")


def test_every_caution_that_the_code_gives_is_explained():
    code = "".join(path.read_text() for path in (ROOT / "layerlens").rglob("*.py"))
    given = set(re.findall(r'code="(LL\d{3})"', code))
    assert given == set(re.findall(r"^\| (LL\d{3}) \|", DOCS["cautions.md"], flags=re.MULTILINE))


@pytest.mark.parametrize("name", ["README.md", *DOCS])
def test_links_and_images_lead_somewhere(name):
    text, folder = (README, ROOT) if name == "README.md" else (DOCS[name], ROOT / "docs")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (folder / target).exists(), target


def test_no_module_hides_a_public_name():
    modules = {path.stem for path in (ROOT / "layerlens").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not modules & {name for name in ll.__all__ if not inspect.ismodule(getattr(ll, name))}
