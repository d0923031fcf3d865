"""Which layers a network has, in which order, and what a selection means."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from layerlens.errors import ShapeError, UnknownLayerError
from layerlens.layers import Layer, discover, main_tensor, module_of, replace_main_tensor, run_batch, select
from layerlens.models import build_model


def names(layers: list[Layer]) -> list[str]:
    return [layer.name for layer in layers]


def chosen(model: nn.Module, batch: Tensor, layers: str | list[str] = "auto") -> list[str]:
    return names(select(model, discover(model, batch), layers))


class Backwards(nn.Module):
    """Registers its layers in the opposite of the order in which they run."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.blocks = nn.ModuleDict({"late": nn.Sequential(nn.Linear(4, 4), nn.ReLU())})
        self.blocks["early"] = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.stem = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks["late"](self.blocks["early"](self.stem(x))))


class Repeats(nn.Module):
    """One ReLU that runs twice, and a layer that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.relu = nn.ReLU()
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.second(self.relu(self.first(x))))


class SharedBlock(nn.Module):
    """A block with its own weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


class Recurrent(nn.Module):
    """One block that runs three times, as in ALBERT."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Linear(3, 4), SharedBlock(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for _ in range(3):
            x = self.block(x)
        return self.head(x)


class Encoder(nn.Module):
    """A small transformer encoder on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    return build_model("resnet18-cifar,width=8")


@pytest.fixture(scope="module")
def resnet20() -> nn.Module:
    return build_model("resnet20-cifar")


IMAGES, SMALL = torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 8, 8)
RESNET20_BLOCKS = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3)]


# --- the default layers ------------------------------------------------------------------------------------------


def test_resnet18_has_stem_stages_pool_and_head(resnet18):
    assert chosen(resnet18, SMALL) == ["relu", "layer1", "layer2", "layer3", "layer4", "avgpool", "fc"]


def test_resnet18_default_layers_are_numbered_from_the_input(resnet18):
    found = discover(resnet18, IMAGES)
    numbered = {layer.name: layer.index for layer in found if layer.index is not None}
    assert numbered == {
        "input": -1, "relu": 0, "layer1": 1, "layer2": 2, "layer3": 3, "layer4": 4, "avgpool": 5, "fc": 6,
    }  # fmt: skip


def test_resnet18_shapes_and_neurons_are_of_one_sample(resnet18):
    by_name = {layer.name: layer for layer in discover(resnet18, IMAGES)}
    shapes = {name: by_name[name].shape for name in ("input", "relu", "layer1", "layer4", "avgpool", "fc")}
    assert shapes == {
        "input": (3, 32, 32), "relu": (8, 32, 32), "layer1": (8, 32, 32), "layer4": (64, 4, 4), "avgpool": (64, 1, 1),
        "fc": (10,),
    }  # fmt: skip
    assert by_name["input"].neurons == 3072
    assert by_name["layer4"].neurons == 1024
    assert by_name["fc"].neurons == 10
    assert by_name["layer4"].kind == "Sequential"


def test_resnet18_blocks_are_its_eight_basic_blocks(resnet18):
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in range(2)]
    assert chosen(resnet18, SMALL, "blocks") == ["relu", *blocks, "avgpool", "fc"]


def test_resnet20_stages_and_its_twelve_block_level_layers(resnet20):
    assert chosen(resnet20, SMALL) == ["relu", "layer1", "layer2", "layer3", "avgpool", "linear"]
    assert chosen(resnet20, SMALL, "blocks") == ["relu", *RESNET20_BLOCKS, "avgpool", "linear"]
    assert len(chosen(resnet20, SMALL, "blocks")) == 12


@pytest.mark.parametrize("layers", ["auto", "blocks"])
def test_mlp_has_its_blocks_and_its_head(layers):
    model = build_model("mlp,width=5,depth=3", input_shape=(1, 2, 2))
    assert chosen(model, torch.zeros(2, 1, 2, 2), layers) == ["blocks.0", "blocks.1", "blocks.2", "fc"]


@pytest.mark.parametrize("layers", ["auto", "blocks"])
def test_plain_sequential_is_cut_behind_each_weighted_layer_and_what_follows_it(layers):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Dropout(), nn.Linear(6, 2),
    )  # fmt: skip
    assert chosen(model, torch.zeros(2, 3, 8, 8), layers) == ["2", "5", "8"]


@pytest.mark.parametrize("layers", ["auto", "blocks"])
def test_transformer_has_embedding_layers_norm_and_head(layers):
    tokens = torch.zeros(2, 5, dtype=torch.long)
    assert chosen(Encoder(), tokens, layers) == ["embed", "layers.0", "layers.1", "layers.2", "norm", "head"]


def test_transformer_layer_shape_keeps_the_tokens():
    by_name = {layer.name: layer for layer in discover(Encoder(), torch.zeros(2, 5, dtype=torch.long))}
    assert by_name["layers.1"].shape == (5, 8)
    assert by_name["layers.1"].neurons == 40
    assert by_name["input"].shape == (5,)


def test_densenet_has_dense_blocks_between_its_transitions():
    model = build_model("torchvision:densenet121", classes=2)
    parts = [f"features.{kind}" for kind in (
        "pool0", "denseblock1", "transition1", "denseblock2", "transition2", "denseblock3", "transition3",
        "denseblock4", "norm5",
    )]  # fmt: skip
    assert chosen(model, IMAGES) == [*parts, "classifier"]


def test_execution_order_counts_not_registration_order():
    model, batch = Backwards(), torch.zeros(2, 3)
    assert names(discover(model, batch)) == [
        "input", "stem", "blocks.early.0", "blocks.early.1", "blocks.early", "blocks.late.0", "blocks.late.1",
        "blocks.late", "head",
    ]  # fmt: skip
    assert chosen(model, batch) == ["stem", "blocks.early", "blocks.late", "head"]


def test_a_selection_comes_in_execution_order_however_it_is_written():
    model, batch = Backwards(), torch.zeros(2, 3)
    assert chosen(model, batch, "head,input,stem") == ["input", "stem", "head"]


def test_weight_shared_block_is_one_layer_per_call():
    assert chosen(Recurrent(), torch.zeros(2, 3)) == ["embed", "block#1", "block#2", "block#3", "head"]


def test_discover_leaves_the_model_in_train_mode_without_hooks(resnet20):
    resnet20.train()
    discover(resnet20, SMALL)
    assert all(module.training for module in resnet20.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in resnet20.modules())


def test_discover_runs_in_eval_mode_so_that_one_sample_is_enough():
    model = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        model(torch.zeros(1, 3))
    assert names(discover(model, torch.zeros(1, 3))) == ["input", "0"]


def test_discover_takes_away_its_hooks_when_forward_raises():
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(ShapeError, match="mat1 and mat2"):
        discover(model, torch.zeros(2, 4))
    assert not model[0]._forward_hooks
    assert model[0].training


def test_discover_refuses_a_batch_without_a_tensor():
    class Constant(nn.Module):
        def forward(self, _words: str) -> Tensor:
            return torch.zeros(2, 2)

    with pytest.raises(ShapeError, match="a batch must hold a tensor; got str"):
        discover(Constant(), "words")


def test_discover_runs_the_forward_it_is_given():
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "skipped": nn.Linear(3, 2)})
    found = discover(model, torch.zeros(2, 3), forward=lambda m, batch: m["used"](batch))
    assert names(found) == ["input", "used"]


def test_layers_without_a_tensor_of_samples_are_left_out():
    class Scalar(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum()

    class Silent(nn.Module):
        def forward(self, _x: Tensor) -> None:
            return None

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.scalar, self.silent = nn.Linear(3, 2), Scalar(), Silent()

        def forward(self, x: Tensor) -> Tensor:
            self.silent(x)
            return self.linear(x) * self.scalar(x)

    assert names(discover(Model(), torch.zeros(2, 3))) == ["input", "linear"]


# --- selection ---------------------------------------------------------------------------------------------------


def test_all_is_every_layer_that_runs_but_not_the_input(resnet20):
    found = discover(resnet20, SMALL)
    assert names(select(resnet20, found, "all")) == names(found)[1:]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("layer?", ["layer1", "layer2", "layer3"]),
        ("layer2.*.conv1", ["layer2.0.conv1", "layer2.1.conv1", "layer2.2.conv1"]),
        ("avgpool, layer1", ["layer1", "avgpool"]),
        ("layer1,layer[12]", ["layer1", "layer2"]),
        (["linear", "input"], ["input", "linear"]),
        ("input", ["input"]),
    ],
)
def test_select_takes_names_globs_and_lists(resnet20, layers, expected):
    assert chosen(resnet20, SMALL, layers) == expected


def test_select_can_name_an_inner_layer_that_has_no_index(resnet20):
    (layer,) = select(resnet20, discover(resnet20, SMALL), "layer1.0.conv1")
    assert layer.index is None
    assert layer.kind == "Conv2d"


def test_select_unknown_name_lists_the_closest(resnet20):
    with pytest.raises(
        UnknownLayerError, match=r"no layer 'layer4' in CifarResNet; closest: layer\d.*layerlens layers"
    ):
        chosen(resnet20, SMALL, "layer4")


def test_select_one_unknown_name_in_a_list_is_an_error(resnet20):
    with pytest.raises(UnknownLayerError, match="no layer 'avgpol' in CifarResNet; closest: avgpool"):
        chosen(resnet20, SMALL, "layer1,avgpol")


def test_select_glob_that_matches_nothing_is_an_error(resnet20):
    with pytest.raises(UnknownLayerError, match=r"no layer 'stage\*'"):
        chosen(resnet20, SMALL, "stage*")


def test_module_that_runs_twice_is_one_layer_per_call():
    found = names(discover(Repeats(), torch.zeros(2, 3)))
    assert found == ["input", "first", "relu#1", "second", "relu#2"]


def test_select_by_bare_name_of_a_repeated_module_names_the_calls():
    with pytest.raises(UnknownLayerError, match="'relu' runs 2 times in a pass; name one call: relu#1, relu#2"):
        chosen(Repeats(), torch.zeros(2, 3), "relu")


def test_select_calls_of_a_repeated_module():
    assert chosen(Repeats(), torch.zeros(2, 3), "relu#2") == ["relu#2"]
    assert chosen(Repeats(), torch.zeros(2, 3), "relu#*") == ["relu#1", "relu#2"]


def test_select_a_module_that_never_runs_says_so():
    with pytest.raises(UnknownLayerError, match="'unused' never runs in the forward pass"):
        chosen(Repeats(), torch.zeros(2, 3), "unused")


def test_module_of_ignores_the_call_number():
    model = Repeats()
    assert module_of(model, "relu#2") is model.relu


# --- batches and outputs -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    note: str
    state: Tensor
    scores: Tensor | None = None


Pair = namedtuple("Pair", ["left", "right"])
A, B = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])

STRUCTURES = {
    "tensor": A,
    "tuple": (A, B),
    "list": [A, B],
    "namedtuple": Pair(None, A),
    "dict": {"note": "text", "state": A, "other": B},
    "ordered dict": OrderedDict(state=A, other=B),
    "dataclass": Result("text", A, B),
    "nested": ({"inner": [None, Result("text", A)]}, B),
}


@pytest.mark.parametrize("output", STRUCTURES.values(), ids=STRUCTURES)
def test_main_tensor_is_the_first_of_any_structure(output):
    assert main_tensor(output) is A


@pytest.mark.parametrize("output", [None, "text", 3, (), {"a": 1}, Result], ids=str)
def test_main_tensor_of_what_holds_none_is_none(output):
    assert main_tensor(output) is None


@pytest.mark.parametrize("output", STRUCTURES.values(), ids=STRUCTURES)
def test_replace_main_tensor_changes_that_tensor_alone(output):
    new = torch.tensor([[9.0, 9.0]])
    changed = replace_main_tensor(output, new)
    assert type(changed) is type(output)
    assert main_tensor(changed) is new
    assert main_tensor(output) is A


def test_replace_main_tensor_keeps_what_stands_beside_it():
    new = torch.zeros(1, 2)
    assert replace_main_tensor((A, B), new)[1] is B
    assert replace_main_tensor({"state": A, "other": B}, new)["other"] is B
    assert replace_main_tensor(Result("text", A, B), new).scores is B
    assert replace_main_tensor(({"inner": [None, A]}, B), new)[0]["inner"][0] is None


def test_replace_main_tensor_refuses_an_output_without_a_tensor():
    with pytest.raises(ShapeError, match="a dict without a tensor"):
        replace_main_tensor({"a": 1}, A)


def test_run_batch_takes_tensors_pairs_and_mappings():
    model = nn.Bilinear(2, 2, 1, bias=False)
    model.weight.data = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])  # the inner product
    identity = nn.Identity()
    assert torch.equal(run_batch(identity, A), A)
    assert torch.equal(run_batch(identity, (A, "label")), A)
    assert torch.equal(run_batch(identity, [A, None]), A)
    assert run_batch(model, {"input2": B, "input1": A}).item() == 11.0
