"""Models by name, their heads, and their untrained twins."""

from __future__ import annotations

import random
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50

from layerlens.activations import features
from layerlens.errors import ConfigError, DownloadError, ShapeError, UnknownNameError
from layerlens.models import (
    ConvNetQuick,
    ProjectionHead,
    build_model,
    default_input_shape,
    head_name,
    reinitialized,
    replace_head,
    runs_only_layerlens_code,
)

SMALL = (3, 8, 8)


def images(count: int = 2, *shape: int) -> Tensor:
    return torch.randn(count, *(shape or SMALL), generator=torch.Generator().manual_seed(0))


def weights(model: nn.Module) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


def same(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and bool(torch.equal(left, right))


# --- the families ------------------------------------------------------------------------------------------------


def akamaster_names(blocks: int) -> set[str]:
    """State-dict names of akamaster/pytorch_resnet_cifar10, option A, written down from its paper and code."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    inner = ["conv1.weight", "conv2.weight", *(f"bn{i}.{part}" for i in (1, 2) for part in norm)]
    stem = ["conv1.weight", *(f"bn1.{part}" for part in norm), "linear.weight", "linear.bias"]
    return {*stem, *(f"layer{s}.{b}.{name}" for s in (1, 2, 3) for b in range(blocks) for name in inner)}


@pytest.mark.parametrize(("depth", "blocks"), [(20, 3), (32, 5), (44, 7), (56, 9)])
def test_cifar_resnets_have_their_names_and_their_depth(depth, blocks):
    model = build_model(f"resnet{depth}-cifar")
    assert set(model.state_dict()) == akamaster_names(blocks)
    assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules()) == depth


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85)])
def test_cifar_resnets_have_as_many_parameters_as_the_paper_says(depth, millions):
    model = build_model(f"resnet{depth}-cifar")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize("depth", [20, 32, 56])
def test_akamaster_weights_load_exactly(depth, shared_data):
    path = shared_data / "weights" / f"akamaster_cifar10_resnet{depth}.pt"
    state = torch.load(path, weights_only=True)
    model = build_model(f"resnet{depth}-cifar")
    model.load_state_dict(state, strict=True)
    learned = {name for name in model.state_dict() if not name.endswith("num_batches_tracked")}
    assert set(state) - learned <= set(model.state_dict())
    assert all(same(model.state_dict()[name], state[name]) for name in learned)


def test_cifar_block_shortcut_subsamples_and_pads_channels_on_both_sides():
    block = build_model("resnet20-cifar").layer2[0].eval()
    nn.init.zeros_(block.bn2.weight)  # what remains is the shortcut
    x = images(1, 16, 8, 8).abs()
    with torch.no_grad():
        out = block(x)
    assert out.shape == (1, 32, 4, 4)
    assert same(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_resnet18_cifar_has_torchvisions_names():
    assert list(build_model("resnet18-cifar").state_dict()) == list(resnet18().state_dict())


def test_resnet18_cifar_has_torchvisions_shapes_but_for_stem_and_classifier():
    ours, theirs = build_model("resnet18-cifar").state_dict(), resnet18().state_dict()
    assert {name for name in ours if ours[name].shape != theirs[name].shape} == {"conv1.weight", "fc.weight", "fc.bias"}
    assert ours["conv1.weight"].shape == (64, 3, 3, 3)


@pytest.mark.parametrize("width", [1, 8])
def test_resnet18_width_scales_every_stage(width):
    model = build_model(f"resnet18-cifar,width={width}")
    state = model.state_dict()
    assert state["conv1.weight"].shape == (width, 3, 3, 3)
    assert [state[f"layer{s}.0.conv1.weight"].shape[0] for s in (1, 2, 3, 4)] == [
        width,
        2 * width,
        4 * width,
        8 * width,
    ]
    assert model.eval()(images()).shape == (2, 10)


def test_resnet18_on_cifar_keeps_the_resolution_of_the_stem():
    model = build_model("resnet18-cifar,width=2").eval()
    assert model.maxpool(model.conv1(images())).shape == (2, 2, 8, 8)


@pytest.mark.parametrize("spec", ["resnet18-cifar,width=2", "resnet20-cifar", "mlp,width=4,depth=2"])
def test_models_take_the_shape_and_the_classes_they_are_built_for(spec):
    model = build_model(spec, input_shape=(1, 8, 8), classes=7).eval()
    assert model(images(2, 1, 8, 8)).shape == (2, 7)


@pytest.mark.parametrize("spec", ["resnet18-cifar,width=2,classes=4", "resnet20-cifar,classes=4", "mlp,classes=4"])
def test_the_specification_wins_over_the_number_of_classes(spec):
    assert build_model(spec, input_shape=SMALL, classes=7).eval()(images()).shape == (2, 4)


def test_mlp_width_and_depth():
    model = build_model("mlp,width=5,depth=3", input_shape=(1, 2, 2), classes=2)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if name.endswith("weight")}
    assert shapes == {
        "blocks.0.0.weight": (5, 4), "blocks.1.0.weight": (5, 5), "blocks.2.0.weight": (5, 5), "fc.weight": (2, 5),
    }  # fmt: skip


@pytest.mark.parametrize("spec", ["resnet18-cifar,width=2", "resnet20-cifar", "mlp,width=3"])
def test_a_seed_fixes_the_weights(spec):
    def drawn(seed: int) -> dict[str, bytes]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return weights(build_model(spec))

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_torchvision_models_come_by_name():
    model = build_model("torchvision:resnet18", classes=3)
    assert list(model.state_dict()) == list(resnet18().state_dict())
    assert model.fc.out_features == 3


def test_torchvision_options_are_passed_on():
    assert build_model("torchvision:resnet18,num_classes=5", classes=3).fc.out_features == 5


@pytest.mark.parametrize(
    ("spec", "shape"),
    [("resnet20-cifar", (3, 32, 32)), ("mlp,width=3", (3, 32, 32)), ("torchvision:resnet18", (3, 224, 224)),
     ("pkg.mod:make", None)],
)  # fmt: skip
def test_default_input_shape(spec, shape):
    assert default_input_shape(spec) == shape


@pytest.mark.parametrize(
    ("spec", "alone"),
    [("resnet18-cifar,width=8", True), ("mlp", True), ("torchvision:resnet18", True), ("os:system", False),
     ("pkg.mod:make", False), ("torchvision.models:resnet18", False), ("nonsense", False), ("", False)],
)  # fmt: skip
def test_runs_only_layerlens_code(spec, alone):
    assert runs_only_layerlens_code(spec) is alone


# --- what can't be built -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet18-cfar", "unknown model 'resnet18-cfar'; closest: resnet18-cifar"),
        ("ResNet-50", "unknown model 'ResNet-50'.*or pkg.module:factory"),
        ("torchvision:resnet81", "torchvision has no model 'resnet81'; closest: .*resnet18"),
        ("no_such_module_42:make", "can't import 'no_such_module_42'"),
    ],
)
def test_unknown_models_name_the_closest(spec, message):
    with pytest.raises(UnknownNameError, match=message):
        build_model(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet18-cifar,widht=8", "has no option 'widht'; closest: width"),
        ("resnet20-cifar,width=8", "has no option 'width'"),
        ("mlp,layers=3", "has no option 'layers'"),
        ("mlp:3", "'mlp:3': options follow the name with commas, such as mlp,option=value"),
        ("gin:3", "'gin:3': options follow the name with commas, such as gin,option=value"),
        ("torchvision:resnet18,widht=3", "widht"),
        ("torchvision:resnet18,weights=nonsense", "nonsense"),
    ],
)
def test_unknown_options_are_an_error(spec, message):
    with pytest.raises(ConfigError, match=message):
        build_model(spec)


@pytest.mark.parametrize(
    "spec",
    ["resnet18-cifar,width=0", "resnet18-cifar,width=-4", "resnet18-cifar,width=1.5", "resnet18-cifar,width=wide",
     "resnet20-cifar,classes=0", "resnet20-cifar,classes=ten", "mlp,width=0", "mlp,depth=-1", "mlp,width=deep"],
)  # fmt: skip
def test_option_values_outside_their_range_are_an_error(spec):
    with pytest.raises(ConfigError, match=spec.partition(",")[2].partition("=")[0]):
        build_model(spec)


@pytest.mark.parametrize(
    "error", [URLError("no route"), RuntimeError("invalid hash value")], ids=["network", "damaged"]
)
def test_weights_that_can_not_be_fetched_are_a_download_error(error, monkeypatch):
    def fail(*_args: object, **_kwargs: object) -> None:
        raise error

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(DownloadError, match=r"could not fetch the weights of 'torchvision:resnet18,weights=DEFAULT'"):
        build_model("torchvision:resnet18,weights=DEFAULT")


# --- anybody's factory -------------------------------------------------------------------------------------------


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_networks.py").write_text(
        "from torch import nn\n"
        "def make(width=4):\n    return nn.Linear(width, 2)\n"
        "def wrong():\n    return [1, 2]\n"
        "class Net(nn.Linear):\n    def __init__(self):\n        super().__init__(3, 1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "my_networks"


def test_a_factory_is_called_with_its_options(factories):
    assert build_model(f"{factories}:make").in_features == 4
    assert build_model(f"{factories}:make,width=6").in_features == 6


def test_a_class_is_a_factory_too(factories):
    assert isinstance(build_model(f"{factories}:Net"), nn.Linear)


def test_a_factory_that_returns_no_module_is_an_error(factories):
    with pytest.raises(ConfigError, match=r"'my_networks:wrong' must return a torch.nn.Module; it returned list"):
        build_model(f"{factories}:wrong")


def test_a_factory_that_is_not_there_names_the_closest(factories):
    with pytest.raises(UnknownNameError, match="my_networks has no callable 'mak'; closest: make"):
        build_model(f"{factories}:mak")


# --- heads -------------------------------------------------------------------------------------------------------


def test_projection_head_is_linear_relu_linear():
    head = ProjectionHead(6, out=3)
    assert [type(module) for module in head] == [nn.Linear, nn.ReLU, nn.Linear]
    assert [tuple(p.shape) for p in head.parameters()] == [(6, 6), (6,), (3, 6), (3,)]


@pytest.mark.parametrize(
    ("spec", "name", "width"),
    [("resnet18-cifar,width=2", "fc", 16), ("resnet20-cifar", "linear", 64), ("mlp,width=5,depth=2", "fc", 5)],
)
@pytest.mark.parametrize("head", [ProjectionHead, lambda width: nn.Linear(width, 128)], ids=["projection", "linear"])
def test_replace_head_takes_the_place_of_the_classifier(spec, name, width, head):
    model = build_model(spec, input_shape=SMALL)
    changed, found = replace_head(model, images(), head)
    assert changed is model
    assert found == name
    assert head_name(changed, images()) == name
    assert changed.eval()(images()).shape == (2, 128)
    assert features(changed, [images()]).shape == (2, width)


def test_replace_head_leaves_the_backbone_alone():
    model = build_model("resnet20-cifar")
    before = weights(model)
    replace_head(model, images(), lambda width: nn.Linear(width, 3))
    after = weights(model)
    assert {name for name in before if after[name] != before[name]} == {"linear.weight", "linear.bias"}
    assert all(module.training for module in model.modules())


def test_replace_head_replaces_a_whole_projection_head():
    model, _ = replace_head(build_model("mlp,width=5,depth=1", input_shape=SMALL), images(), ProjectionHead)
    again, name = replace_head(model, images(), lambda width: nn.Linear(width, 3))
    assert name == "fc"
    assert isinstance(again.fc, nn.Linear)
    assert again.fc.in_features == 5


class Embeds(nn.Module):
    """Pools; what it returns is an embedding of three numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x).flatten(1)


@pytest.mark.parametrize("model", [Embeds(), nn.Sequential(nn.Flatten(), nn.Linear(192, 3), nn.ReLU())],
                         ids=["pooled", "activation"])  # fmt: skip
def test_replace_head_goes_behind_a_model_that_ends_in_an_embedding(model):
    changed, name = replace_head(model, images(), lambda width: nn.Linear(width, 4))
    assert name == "head"
    assert changed.backbone is model
    assert changed.head.in_features == 3
    assert changed(images()).shape == (2, 4)
    assert head_name(changed, images()) == "head"
    torch.testing.assert_close(features(changed, [images()]), model(images()).detach())


def test_replace_head_refuses_maps():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(
        ShapeError,
        match=r"the model returns shape \(2, 4, 6, 6\); training needs one tensor",
    ):
        replace_head(model, images(), ProjectionHead)


def test_replace_head_refuses_a_model_that_returns_no_tensor():
    model = nn.Sequential(nn.LSTM(3, 4, batch_first=True))
    with pytest.raises(ShapeError, match="the model returns a tuple; training needs one tensor"):
        replace_head(model, images(2, 5, 3), ProjectionHead)


def test_head_name_of_a_model_without_a_head_is_empty():
    assert head_name(Embeds(), images()) == ""


@pytest.mark.parametrize("behind", [nn.ReLU(), nn.Flatten(), nn.Tanh()], ids=repr)
def test_an_operation_without_weights_is_no_head(behind):
    assert head_name(nn.Sequential(nn.Conv2d(3, 2, 8), behind), images()) == ""


def test_head_name_looks_into_wrappers():
    model = nn.Sequential(nn.Identity(), build_model("mlp,width=3,depth=1", input_shape=SMALL))
    assert head_name(model, images()) == "1.fc"


def test_head_name_leaves_no_hooks_and_no_statistics():
    model = build_model("resnet20-cifar")
    before = weights(model)
    head_name(model, images())
    assert weights(model) == before
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


# --- the untrained twin ------------------------------------------------------------------------------------------


def trained(spec: str = "resnet20-cifar") -> nn.Module:
    """A model whose every weight and statistic differs from what a constructor gives."""
    model = build_model(spec, input_shape=SMALL)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(1)
    return model


@pytest.mark.parametrize("spec", ["resnet20-cifar", "resnet18-cifar,width=2", "mlp,width=4,depth=2"])
def test_the_twin_differs_in_every_weight_and_statistic(spec):
    model = trained(spec)
    twin = reinitialized(model)
    assert list(twin.state_dict()) == list(model.state_dict())
    ours = model.state_dict()
    assert [name for name, value in twin.state_dict().items() if torch.equal(value, ours[name])] == []


def test_the_twin_is_the_same_for_the_same_seed():
    model = trained()
    assert weights(reinitialized(model, seed=3)) == weights(reinitialized(model, seed=3))
    assert weights(reinitialized(model, seed=3)) != weights(reinitialized(model, seed=4))


def test_the_twin_of_a_twin_with_the_same_seed_is_the_same():
    model = trained()
    assert weights(reinitialized(reinitialized(model, seed=1), seed=0)) == weights(reinitialized(model, seed=0))


def test_the_twin_leaves_the_original_and_the_generators_alone():
    model = trained()
    model.layer1.eval()
    before = weights(model), torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()
    twin = reinitialized(model, seed=5)
    after = weights(model), torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()
    assert after == before
    assert [m.training for m in twin.modules()] == [m.training for m in model.modules()]
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_the_twin_draws_attention_anew():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    twin = dict(reinitialized(model).named_parameters())
    assert [name for name, value in model.named_parameters() if torch.equal(twin[name], value)] == []


def test_the_twin_draws_children_before_parents():
    class Zeroed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def reset_parameters(self) -> None:
            nn.init.zeros_(self.linear.weight)

    assert not reinitialized(Zeroed()).linear.weight.any()


class Token(nn.Module):
    """Holds a parameter that nobody knows how to draw."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.ones(2))


@pytest.mark.parametrize(("model", "where"), [(Token(), "the model"), (nn.Sequential(nn.Linear(2, 2), Token()), "1")],
                         ids=["root", "inner"])  # fmt: skip
def test_the_twin_of_a_module_without_reset_parameters_is_an_error(model, where):
    with pytest.raises(ConfigError, match=rf"^{where} \(Token\) has parameters but no reset_parameters\(\)"):
        reinitialized(model)


def test_a_failed_twin_leaves_the_generator_alone():
    model = nn.Sequential(Token(), nn.Linear(2, 2))
    before = torch.get_rng_state()
    with pytest.raises(ConfigError, match="own constructor"):
        reinitialized(model)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("spec", ["resnet18-cifar,width=16", "torchvision:resnet18"])
def test_the_twin_of_a_torchvision_resnet_is_drawn_as_its_constructor_draws(spec):
    fresh = build_model(spec)
    twin = reinitialized(fresh)
    for name, weight in fresh.named_parameters():
        if weight.ndim == 4:
            assert twin.get_parameter(name).std().item() == pytest.approx(weight.std().item(), rel=0.1), name


# --- ResNet-50 and Caffe's quick network -------------------------------------------------------------------------


def test_resnet50_cifar_has_torchvisions_names_and_shapes_but_for_stem_and_classifier():
    ours, theirs = build_model("resnet50-cifar").state_dict(), resnet50().state_dict()
    assert list(ours) == list(theirs)
    assert {name for name in ours if ours[name].shape != theirs[name].shape} == {"conv1.weight", "fc.weight", "fc.bias"}
    assert ours["fc.weight"].shape == (10, 2048)


def test_resnet50_takes_width_classes_and_channels():
    model = build_model("resnet50-cifar,width=2,classes=4,channels=1").eval()
    assert model.conv1.weight.shape == (2, 1, 3, 3)
    assert [len(getattr(model, f"layer{stage}")) for stage in (1, 2, 3, 4)] == [3, 4, 6, 3]
    assert model.maxpool(model.conv1(images(2, 1, 8, 8))).shape == (2, 2, 8, 8)
    assert model(images(2, 1, 8, 8)).shape == (2, 4)


def test_convnet_quick_has_as_many_parameters_as_caffes():
    """Convolutions 5·5·3·32 + 32, 5·5·32·32 + 32, 5·5·32·64 + 64; linear 64·4·4·64 + 64, 64·10 + 10."""
    shapes = {name: tuple(value.shape) for name, value in build_model("convnet-quick").state_dict().items()}
    assert shapes == {
        "conv1.weight": (32, 3, 5, 5), "conv1.bias": (32,), "conv2.weight": (32, 32, 5, 5), "conv2.bias": (32,),
        "conv3.weight": (64, 32, 5, 5), "conv3.bias": (64,), "fc1.weight": (64, 1024), "fc1.bias": (64,),
        "fc2.weight": (10, 64), "fc2.bias": (10,),
    }  # fmt: skip


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (3, 9, 15), (2, 33, 24)])
def test_convnet_quick_halves_images_of_any_size_three_times(shape):
    model = build_model("convnet-quick", input_shape=shape, classes=7)
    sizes = []
    for pool in (model.pool1, model.pool2, model.pool3):
        pool.register_forward_hook(lambda _m, _i, out: sizes.append(tuple(out.shape[2:])))
    assert model(images(2, *shape)).shape == (2, 7)
    assert sizes == [(shape[1] // 2**k, shape[2] // 2**k) for k in (1, 2, 3)]


def test_convnet_quick_pools_as_caffe_does():
    """A window over the border counts the cells inside it alone: the mean of a constant map is that constant."""
    model = build_model("convnet-quick", input_shape=SMALL)
    ramp = torch.arange(16.0).view(1, 1, 4, 4)
    assert model.pool2(torch.ones(1, 1, 8, 8)).unique().tolist() == [1.0]
    assert model.pool2(ramp)[0, 0].tolist() == [[5.0, 6.5], [11.0, 12.5]]
    assert model.pool1(ramp)[0, 0].tolist() == [[10.0, 11.0], [14.0, 15.0]]


def test_convnet_quick_is_the_composition_it_says():
    model = build_model("convnet-quick", input_shape=SMALL)
    f, x = nn.functional, images()
    h = f.max_pool2d(f.conv2d(x, model.conv1.weight, model.conv1.bias, padding=2), 3, 2, ceil_mode=True).relu()
    for conv in (model.conv2, model.conv3):
        h = f.avg_pool2d(f.conv2d(h, conv.weight, conv.bias, padding=2).relu(), 3, 2, ceil_mode=True)
    torch.testing.assert_close(model(x), model.fc2(model.fc1(h.flatten(1))))


def test_convnet_quick_changes_nothing_in_place():
    model = build_model("convnet-quick", input_shape=SMALL)
    assert not any(getattr(module, "inplace", False) for module in model.modules())
    assert len([m for m in model.modules() if isinstance(m, nn.ReLU)]) == 3


def test_convnet_quick_takes_classes_and_channels():
    model = build_model("convnet-quick,classes=4,channels=1", input_shape=SMALL)
    assert model(images(2, 1, 8, 8)).shape == (2, 4)


@pytest.mark.parametrize("shape", [(3, 7, 8), (3, 32, 4)])
def test_convnet_quick_refuses_images_of_which_nothing_would_remain(shape):
    with pytest.raises(ShapeError, match=rf"images of 8×8 or more; got {shape[1]}×{shape[2]}"):
        ConvNetQuick(shape)


@pytest.mark.parametrize(
    ("spec", "message"),
    [("convnet-quick,width=8", "has no option 'width'"), ("convnet-quick,classes=0", "classes=0; allowed"),
     ("resnet50-cifar,width=0", "resnet50-cifar with width=0; allowed"), ("resnet50-cifar,depth=2", "option .depth.")],
)  # fmt: skip
def test_options_of_the_new_models_are_checked(spec, message):
    with pytest.raises(ConfigError, match=message):
        build_model(spec)


@pytest.mark.parametrize(
    ("spec", "name", "width"), [("resnet50-cifar,width=2", "fc", 64), ("convnet-quick", "fc2", 64)]
)
def test_the_new_models_take_heads_and_have_twins(spec, name, width):
    model = trained(spec)
    twin = reinitialized(model).state_dict()
    assert [key for key, value in model.state_dict().items() if torch.equal(twin[key], value)] == []
    changed, found = replace_head(model, images(), ProjectionHead)
    assert found == name
    assert features(changed, [images()]).shape == (2, width)
