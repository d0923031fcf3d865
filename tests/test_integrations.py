"""Deep Augmentation in the trainers of Hugging Face: it acts while they train, and only then."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("sentence_transformers")
pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")

import transformers  # noqa: E402
from sentence_transformers import (  # noqa: E402
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator  # noqa: E402
from sentence_transformers.sentence_transformer.losses import (  # noqa: E402
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402

from layerlens.augment.deep import DeepAugmentation  # noqa: E402
from layerlens.errors import ConfigError, ExtraMissingError, UnknownLayerError  # noqa: E402
from layerlens.integrations import sentence_transformers as for_sentences  # noqa: E402
from layerlens.integrations import transformers as for_trainer  # noqa: E402

FIRST = ["a cat sat on the mat", "the dog runs fast", "a slow dog sat", "the cat runs", "on the mat a dog", "fast cat",
         "the slow cat sat on a dog", "a mat"]  # fmt: skip
SECOND = ["the cat sat", "a fast dog", "the dog sat on a mat", "a cat runs fast", "the dog", "a cat", "slow", "the mat"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({w for line in FIRST for w in line.split()})]
BLOCK = "0.model.encoder.layer.1"


def tokenizer() -> Any:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    )  # fmt: skip


def bert_config(**changes: Any) -> transformers.BertConfig:
    sizes = {
        "vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 32,
    }  # fmt: skip
    return transformers.BertConfig(**{**sizes, **changes})


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.BertModel(bert_config()).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def same_random_state() -> Iterator[None]:
    """The trainers seed the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def sentences_model(bert_folder: Path) -> SentenceTransformer:
    return SentenceTransformer(modules=[Transformer(str(bert_folder)), Pooling(16)], device="cpu")


def trainer_of(model: SentenceTransformer, folder: Path, *callbacks: Any, evaluator: Any = None, **changes: Any) -> Any:
    usual = {
        "max_steps": 4, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none", "seed": 3,
        "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "dataloader_pin_memory": False,
        "learning_rate": 1e-3,
    }  # fmt: skip
    return SentenceTransformerTrainer(
        model,
        SentenceTransformerTrainingArguments(str(folder), **{**usual, **changes}),
        train_dataset=datasets.Dataset.from_dict({"anchor": FIRST, "positive": SECOND}),
        loss=MultipleNegativesRankingLoss(model),
        evaluator=evaluator,
        callbacks=list(callbacks),
    )


def losses_of(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture(scope="module")
def plain_losses(bert_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Of a run without the callback."""
    model = SentenceTransformer(modules=[Transformer(str(bert_folder)), Pooling(16)], device="cpu")
    with torch.random.fork_rng(devices=[]):
        trainer = trainer_of(model, tmp_path_factory.mktemp("plain"))
        trainer.train()
    return losses_of(trainer)


class Counting:
    """A transform that leaves values alone and counts its calls."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, h: Tensor) -> Tensor:
        self.shapes.append(tuple(h.shape))
        return h


# --- sentence-transformers ---


@pytest.mark.parametrize("layer", [2, BLOCK, DeepAugmentation(BLOCK, rate=0.5, fraction=1.0)], ids=["2", "name", "own"])
def test_training_is_augmented_and_leaves_no_hook(
    sentences_model: SentenceTransformer, plain_losses: list[float], tmp_path: Path, layer: Any
):
    settings = {} if isinstance(layer, DeepAugmentation) else {"rate": 0.5, "fraction": 1.0}
    callback = for_sentences.DeepAugmentationCallback(layer, **settings)
    before = hooks_on(sentences_model)
    augmented = trainer_of(sentences_model, tmp_path, callback)
    augmented.train()
    assert hooks_on(sentences_model) == before
    assert callback.augmentation.layers == [BLOCK]
    assert len(plain_losses) == len(losses_of(augmented)) == 4
    assert plain_losses[0] != pytest.approx(losses_of(augmented)[0], abs=1e-3)


def test_an_operator_that_changes_nothing_changes_no_run(
    sentences_model: SentenceTransformer, plain_losses: list[float], tmp_path: Path
):
    """So that the difference in the test above is the augmentation's; the draws here are its own generator's."""
    counting = Counting()
    callback = for_sentences.DeepAugmentationCallback(2, transform=counting, generator=torch.Generator().manual_seed(1))
    augmented = trainer_of(sentences_model, tmp_path, callback)
    augmented.train()
    assert plain_losses == losses_of(augmented)
    assert len(counting.shapes) == 8, "four steps, two columns"
    assert {(shape[0], shape[2]) for shape in counting.shapes} == {(4, 16)}


def test_the_share_of_transformed_samples_is_the_fraction(sentences_model: SentenceTransformer, tmp_path: Path):
    seen: list[Tensor] = []

    class Watch(transformers.TrainerCallback):
        def on_train_begin(self, *_given: Any, model: nn.Module, **_others: Any) -> None:
            def note(_m: nn.Module, args: Any) -> None:
                seen.append((args[0] == 0).all(-1).any(-1))

            model.get_submodule("0.model.encoder.layer.2").register_forward_pre_hook(note)

    callback = for_sentences.DeepAugmentationCallback(2, transform=torch.zeros_like, fraction=0.25)
    trainer_of(sentences_model, tmp_path, callback, Watch(), max_steps=16).train()
    zeroed = torch.cat(seen).double()
    assert len(zeroed) == 16 * 8
    assert zeroed.mean().item() == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 128) ** 0.5)


def test_padding_is_left_alone_in_a_real_run(sentences_model: SentenceTransformer, tmp_path: Path):
    seen: list[tuple[Tensor, Tensor]] = []
    masks: list[Tensor] = []

    class Watch(transformers.TrainerCallback):
        def on_train_begin(self, *_given: Any, model: nn.Module, **_others: Any) -> None:
            model.register_forward_pre_hook(lambda _m, args: masks.append(args[0]["attention_mask"]))
            block = model.get_submodule("0.model.encoder.layer.2")
            block.register_forward_pre_hook(lambda _m, args: seen.append(((args[0] == 0).all(-1), masks[-1])))

    callback = for_sentences.DeepAugmentationCallback(2, transform=torch.zeros_like, fraction=1.0)
    trainer_of(sentences_model, tmp_path, callback, Watch()).train()
    assert len(seen) == 8
    assert any((mask == 0).any() for _, mask in seen)
    for zeroed, mask in seen:
        assert torch.equal(zeroed, mask.bool())


def test_evaluation_during_training_is_not_augmented(sentences_model: SentenceTransformer, tmp_path: Path):
    """At learning rate 0 every evaluation must give the embeddings of the start."""
    expected = sentences_model.encode(FIRST)
    found: list[Any] = []

    class Spy(EmbeddingSimilarityEvaluator):
        def __call__(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            assert hooks_on(model) > 0, "the operator is there"
            found.append(model.encode(FIRST))
            return super().__call__(model, *args, **kwargs)

    callback = for_sentences.DeepAugmentationCallback(2, transform=torch.zeros_like, fraction=1.0)
    trainer_of(
        sentences_model, tmp_path, callback, learning_rate=0.0, eval_strategy="steps", eval_steps=2,
        evaluator=Spy(FIRST, SECOND, [i / 7 for i in range(8)]),
    ).train()  # fmt: skip
    assert len(found) == 2
    for embeddings in found:
        assert (embeddings == expected).all()
    assert (sentences_model.encode(FIRST) == expected).all()


def test_a_loss_that_runs_a_batch_twice_gets_the_same_draws(sentences_model: SentenceTransformer):
    """CachedMultipleNegativesRankingLoss embeds without a gradient first, and again with one."""
    features = [sentences_model.preprocess(column) for column in (FIRST, SECOND)]
    gradients, values = [], []
    sentences_model.train()
    with DeepAugmentation(BLOCK, rate=0.5).attached(sentences_model):
        for loss in (
            MultipleNegativesRankingLoss(sentences_model),
            CachedMultipleNegativesRankingLoss(sentences_model, mini_batch_size=8),
        ):
            sentences_model.zero_grad()
            torch.manual_seed(5)
            value = loss([dict(column) for column in features], None)
            value.backward()
            values.append(value.item())
            weight = sentences_model.get_submodule(BLOCK).output.dense.weight
            gradients.append(weight.grad.clone())
    assert values[0] == pytest.approx(values[1], abs=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-4)
    assert gradients[0].any()


def test_gradient_checkpointing_goes_with_the_output_of_a_block(bert_folder: Path, tmp_path: Path):
    losses = []
    for checkpointed in (False, True):
        model = SentenceTransformer(modules=[Transformer(str(bert_folder)), Pooling(16)], device="cpu")
        if checkpointed:
            model[0].model.activation_checkpointing_enable({"use_reentrant": False})
        callback = for_sentences.DeepAugmentationCallback(2, transform="pca", per_token=True, fraction=1.0)
        trainer = trainer_of(model, tmp_path, callback)
        trainer.train()
        losses.append(losses_of(trainer))
    assert model[0].model.is_activation_checkpointing
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


def interrupted(model: nn.Module, error: BaseException) -> Any:
    def stop(module: nn.Module, _args: Any) -> None:
        if module.training:  # not while the callback looks for the layers
            raise error

    return model.get_submodule("0.model.encoder.layer.2").register_forward_pre_hook(stop)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError()], ids=["Ctrl-C", "error"])
@pytest.mark.parametrize("way", ["callback", "operator"])
def test_no_hook_survives_what_interrupts_training(
    sentences_model: SentenceTransformer, tmp_path: Path, error: BaseException, way: str
):
    before = hooks_on(sentences_model)
    handle = interrupted(sentences_model, error)
    callback = for_sentences.DeepAugmentationCallback(2)
    if way == "callback":
        trainer = trainer_of(sentences_model, tmp_path, callback)
        with pytest.raises(type(error)), callback:
            trainer.train()
    else:
        trainer = trainer_of(sentences_model, tmp_path)
        with pytest.raises(type(error)), DeepAugmentation(BLOCK).attached(sentences_model):
            trainer.train()
    handle.remove()
    assert hooks_on(sentences_model) == before


def test_training_can_begin_again_after_an_interruption(sentences_model: SentenceTransformer, tmp_path: Path):
    before, counting = hooks_on(sentences_model), Counting()
    callback = for_sentences.DeepAugmentationCallback(2, transform=counting)
    trainer = trainer_of(sentences_model, tmp_path, callback)
    handle = interrupted(sentences_model, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    handle.remove()
    assert hooks_on(sentences_model) > before, "the trainer tells a callback nothing"
    counting.shapes.clear()
    trainer.train()
    assert len(counting.shapes) == 8, "once each, not twice"
    assert hooks_on(sentences_model) == before


def test_a_run_that_goes_on_from_a_checkpoint_draws_what_one_in_one_go_does(bert_folder: Path, tmp_path: Path):
    losses = {}
    for name, steps in (("whole", [4]), ("parts", [2, 4])):
        for step in steps:
            model = SentenceTransformer(modules=[Transformer(str(bert_folder)), Pooling(16)], device="cpu")
            trainer = trainer_of(
                model, tmp_path / name, for_sentences.DeepAugmentationCallback(2, fraction=1.0), max_steps=step,
                save_strategy="steps", save_steps=2, lr_scheduler_type="constant",
            )  # fmt: skip
            trainer.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-2") if step > steps[0] else None)
            losses[name] = losses_of(trainer)
    assert losses["parts"] == pytest.approx(losses["whole"], abs=1e-5)


@pytest.mark.parametrize(
    ("number", "name"),
    [(0, "0.model.embeddings"), (1, "0.model.encoder.layer.0"), (3, "0.model.encoder.layer.2")],
)
def test_numbers_are_the_papers_in_a_sentence_transformer(sentences_model: SentenceTransformer, number: int, name: str):
    before, training = hooks_on(sentences_model), sentences_model.training
    assert for_sentences.layer_number(sentences_model, number) == name
    assert (hooks_on(sentences_model), sentences_model.training) == (before, training)


def test_a_number_without_a_layer_is_refused(sentences_model: SentenceTransformer, tmp_path: Path):
    before = hooks_on(sentences_model)
    for number in (4, -1):
        trainer = trainer_of(sentences_model, tmp_path, for_sentences.DeepAugmentationCallback(number))
        match = rf"no layer {number} in SentenceTransformer; allowed: 0 \(embeddings\) to 3 \(last block\)"
        with pytest.raises(UnknownLayerError, match=match):
            trainer.train()
    assert hooks_on(sentences_model) == before


def test_an_unknown_name_is_refused_and_leaves_no_hook(sentences_model: SentenceTransformer, tmp_path: Path):
    before = hooks_on(sentences_model)
    callback = for_sentences.DeepAugmentationCallback([1, "0.auto_model.encoder.layer.1"])
    with pytest.raises(UnknownLayerError, match=r"closest: 0\.model\.encoder\.layer\.1"):
        trainer_of(sentences_model, tmp_path, callback).train()
    assert hooks_on(sentences_model) == before


def test_the_two_texts_of_a_pair_are_no_pair_of_views():
    with pytest.raises(ConfigError, match="pairs='one' needs both texts of a pair in one pass"):
        for_sentences.DeepAugmentationCallback(2, pairs="one")


def test_settings_come_once_and_exist():
    with pytest.raises(ConfigError, match="a DeepAugmentation and rate as well"):
        for_sentences.DeepAugmentationCallback(DeepAugmentation(BLOCK), rate=0.5)
    with pytest.raises(TypeError, match="fracton"):
        for_trainer.DeepAugmentationCallback(2, fracton=0.5)
    with pytest.raises(ConfigError, match="rate=2"):
        for_trainer.DeepAugmentationCallback(2, rate=2)


# --- transformers ---


def masked_lines() -> Any:
    encoded = tokenizer()(FIRST, padding=True)
    return datasets.Dataset.from_dict({**encoded, "labels": encoded["input_ids"]})


def test_a_trainer_of_transformers_is_augmented_too(tmp_path: Path):
    model, counting = transformers.BertForMaskedLM(bert_config()), Counting()
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, per_device_eval_batch_size=4, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, eval_strategy="steps",
        eval_steps=1,
    )  # fmt: skip
    callback = for_trainer.DeepAugmentationCallback([0, 3], transform=counting, fraction=1.0)
    trainer = transformers.Trainer(
        model, arguments, train_dataset=masked_lines(), eval_dataset=masked_lines(), callbacks=[callback]
    )
    trainer.train()
    assert callback.augmentation.layers == ["bert.embeddings", "bert.encoder.layer.2"]
    assert len(counting.shapes) == 6, "three steps, two layers; the three evaluations are left alone"
    assert hooks_on(model) == 0


def tiny(kind: str) -> nn.Module:
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2}
    makers = {
        "bert": lambda: transformers.BertModel(bert_config(num_hidden_layers=2)),
        "one block": lambda: transformers.BertModel(bert_config(num_hidden_layers=1)),
        "distilbert": lambda: transformers.DistilBertModel(
            transformers.DistilBertConfig(vocab_size=20, dim=8, hidden_dim=8, n_layers=2, n_heads=2)
        ),
        "roberta": lambda: transformers.RobertaForMaskedLM(
            transformers.RobertaConfig(**sizes, intermediate_size=8, pad_token_id=1)
        ),
        "mpnet": lambda: transformers.MPNetModel(transformers.MPNetConfig(**sizes, intermediate_size=8)),
        "modernbert": lambda: transformers.ModernBertModel(
            transformers.ModernBertConfig(
                **sizes, intermediate_size=8, pad_token_id=0, cls_token_id=1, sep_token_id=2, bos_token_id=1,
                eos_token_id=2,
            )
        ),
        "gpt2": lambda: transformers.GPT2Model(transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=2)),
        "albert": lambda: transformers.AlbertModel(
            transformers.AlbertConfig(**sizes, embedding_size=4, intermediate_size=8)
        ),
    }  # fmt: skip
    return makers[kind]()


NUMBERED = {
    "bert": ["embeddings", "encoder.layer.0", "encoder.layer.1"],
    "one block": ["embeddings", "encoder.layer.0"],
    "distilbert": ["embeddings", "transformer.layer.0", "transformer.layer.1"],
    "roberta": ["roberta.embeddings", "roberta.encoder.layer.0", "roberta.encoder.layer.1"],
    "mpnet": ["embeddings", "encoder.layer.0", "encoder.layer.1"],
    "modernbert": ["embeddings", "layers.0", "layers.1"],
    "gpt2": ["drop", "h.0", "h.1"],
    "albert": [
        "encoder.embedding_hidden_mapping_in", "encoder.albert_layer_groups.0#1", "encoder.albert_layer_groups.0#2"
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", NUMBERED)
def test_numbers_are_the_papers_in_every_family(kind: str):
    model = tiny(kind).train()
    names = NUMBERED[kind]
    assert [for_trainer.layer_number(model, number) for number in range(len(names))] == names
    assert model.training
    assert hooks_on(model) == 0
    with DeepAugmentation(names).attached(model):
        model(**model.dummy_inputs)  # each of them runs


@pytest.mark.parametrize("kind", ["bert", "mpnet", "modernbert", "gpt2"])
def test_a_numbered_layer_gives_the_models_hidden_state(kind: str):
    model = tiny(kind).eval()
    inputs, outputs = model.dummy_inputs, {}
    for number in range(2):  # the last state of some families is behind a norm
        name = for_trainer.layer_number(model, number)
        module = model.get_submodule(name)
        handle = module.register_forward_hook(lambda _m, _a, out, number=number: outputs.update({number: out}))
        states = model(**inputs, output_hidden_states=True).hidden_states
        handle.remove()
        got = outputs[number]
        assert torch.equal(got if isinstance(got, Tensor) else got[0], states[number])


def test_a_model_without_blocks_or_batch_has_no_numbers():
    with pytest.raises(UnknownLayerError, match="Sequential has no list of blocks to number; choose a layer by name"):
        for_trainer.layer_number(nn.Sequential(nn.Linear(2, 2)), 0)

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.blocks = nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
            self.scale = 1.0

        def forward(self, x: Tensor) -> Tensor:
            x = self.scale * self.first(x) if self.scale != 1 else self.first(x)
            for block in self.blocks:
                x = block(x)
            return x

    model, x = Blocks(), torch.ones(3, 2)
    with pytest.raises(ConfigError, match="Blocks brings no batch to number its layers by"):
        for_trainer.layer_number(model, 0)
    assert [for_trainer.layer_number(model, k, x) for k in range(3)] == ["first", "blocks.0", "blocks.1"]
    model.scale = 2.0
    with pytest.raises(UnknownLayerError, match="no module of Blocks gives what its first block is fed"):
        for_trainer.layer_number(model, 0, x)
    model.blocks.requires_grad_(False)
    model.forward = model.first.forward
    with pytest.raises(UnknownLayerError, match="no block of Blocks ran"):
        for_trainer.layer_number(model, 0, x)


def test_several_devices_in_one_process_are_refused():
    from transformers.training_args import ParallelMode

    callback = for_trainer.DeepAugmentationCallback("embeddings")
    arguments = SimpleNamespace(parallel_mode=ParallelMode.NOT_DISTRIBUTED, n_gpu=2)
    model = tiny("bert")
    with pytest.raises(ConfigError, match=r"2 devices in one process \(DataParallel\); .*torchrun"):
        callback.on_train_begin(arguments, None, None, model=model)
    assert hooks_on(model) == 0


# --- imports ---


def test_importing_layerlens_imports_no_library_of_others():
    code = (
        "import sys, layerlens, layerlens.integrations, layerlens.augment.deep; "
        "print([name for name in ('transformers', 'sentence_transformers', 'tokenizers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("module", "title"), [(for_trainer, "Transformers"), (for_sentences, "sentence-transformers")])
def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch, module: Any, title: str):
    package, real = module.__name__.rpartition(".")[2], importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else real(name))
    match = rf"{module.__name__} needs {title}: pip install 'layerlens-torch\[text\]'"
    with pytest.raises(ExtraMissingError, match=match):
        exec(Path(module.__file__).read_text(), {"__name__": module.__name__})
