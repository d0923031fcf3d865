"""The numerical traps of CKA, each of which a published tool falls into; one test or more per trap."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from layerlens.analysis.cka import StreamingCKA
from layerlens.analysis.kernels import centred_gram, u_centre
from layerlens.analysis.similarity import cka_matrix
from layerlens.analysis.whole_set import cka
from layerlens.errors import BatchTooSmallError
from layerlens.recommendation import recommend


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def u_centred(x):
    """U-centring in float64 from the features, entry by entry as Székely and Rizzo write it."""
    x = x.detach().double().flatten(1).numpy()
    x = x - x.mean(0)
    k, n = x @ x.T, len(x)
    np.fill_diagonal(k, 0)
    u = k - k.sum(1, keepdims=True) / (n - 2) - k.sum(0, keepdims=True) / (n - 2) + k.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(u, 0)
    return u


def true_cka(x, y):
    a, b = u_centred(x), u_centred(y)
    return (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())


def biased_true_cka(x, y):
    h = torch.eye(len(x), dtype=torch.float64) - 1 / len(x)
    a, b = (h @ t.double() @ t.double().T @ h for t in (x, y))
    return float((a * b).sum() / (a.norm() * b.norm()))


def half_alike(n=128, p=256, seed=0):
    """Two layers of unit noise that share a part of it."""
    shared, a, b = draw(3, n, p, seed=seed)
    return shared + 0.5 * a, shared + 0.5 * b


def streamed(*batches, **options):
    state = StreamingCKA([f"layer{i}" for i in range(len(batches[0]))], **options)
    for batch in batches:
        state.update(batch)
    return state.compute()


@pytest.mark.parametrize("mean", [100.0, 1000.0])
@pytest.mark.parametrize("estimator", ["debiased", "biased"])
def test_a_large_mean_in_float32_does_not_drown_the_variation(mean, estimator):
    x, y = (t + mean for t in half_alike())
    oracle = {"debiased": true_cka, "biased": biased_true_cka}[estimator](x, y)
    assert 0.3 < oracle < 0.9
    assert cka(x, y, estimator=estimator) == pytest.approx(oracle, abs=1e-6)


def test_self_hsic_is_a_sum_of_squares_and_stays_positive_under_a_large_mean():
    x = draw(32, 64) + 100
    centred = u_centre(centred_gram(x)[0])
    found = streamed([x, draw(32, 64, seed=1) + 100])
    assert found.blocks[0, 0, 0] == pytest.approx(float(centred.square().sum()) / (32 * 29), rel=1e-9)
    assert found.blocks[0, 0, 0] == pytest.approx((u_centred(x) ** 2).sum() / (32 * 29), rel=1e-4)


def test_u_centred_rows_sum_to_zero_with_a_zero_diagonal():
    centred = u_centre(centred_gram(draw(9, 4).double())[0])
    assert centred.diagonal().abs().max() == 0
    torch.testing.assert_close(centred.sum(0), torch.zeros(9, dtype=torch.float64), atol=1e-12, rtol=0)


def test_the_product_of_all_pairs_is_made_in_float64():
    x, y = (t.double() for t in half_alike(n=256, p=20))
    found = streamed([x, y])
    assert found.between("layer0", "layer1") == pytest.approx(true_cka(x, y), abs=1e-12)


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.relu, self.out = nn.Linear(6, 20), nn.ReLU(inplace=True), nn.Linear(20, 4)
        with torch.no_grad():
            self.fc.weight.copy_(draw(20, 6, seed=1))

    def forward(self, x):
        return self.out(self.relu(self.fc(x)))


@pytest.mark.parametrize("estimator", ["minibatch", "debiased"])
def test_an_in_place_relu_behind_a_captured_layer_does_not_change_what_was_captured(estimator):
    model, x = InPlace(), draw(64, 6)
    before = model.fc(x)
    after = before.relu()
    found = cka_matrix(model, [x], ["fc", "relu"], estimator=estimator)
    assert found.between("fc", "relu") == pytest.approx(true_cka(before, after), abs=1e-6)
    assert found.between("fc", "relu") < 0.95


def test_an_in_place_first_layer_does_not_change_the_captured_input():
    model, x = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 4)), draw(64, 6)
    expected = true_cka(x, x.relu())
    assert cka_matrix(model, [x.clone()], ["input", "0"]).between("input", "0") == pytest.approx(expected, abs=1e-6)


def test_the_first_look_at_the_layers_leaves_the_callers_batch_alone():
    model, x = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 4)), draw(64, 6)
    seen = []
    cka_matrix(model, [x], ["1"], forward=lambda net, batch: seen.append(batch.clone()) or net(batch))
    torch.testing.assert_close(seen[-1], draw(64, 6))


def test_a_last_batch_below_four_samples_is_an_error_and_four_are_not():
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(BatchTooSmallError, match="batch 2 has 3 samples"):
        cka_matrix(model, draw(35, 5).split(16), "all")
    found = cka_matrix(model, draw(36, 5).split(16), "all")
    assert found.samples == 36
    assert np.isfinite(found.values).all()


class TwoCopies(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.copy = nn.Linear(12, 8), nn.Linear(12, 8)
        self.copy.load_state_dict(self.net.state_dict())

    def forward(self, x):
        return self.net(x) + self.copy(x)


def test_a_shuffling_loader_is_read_once_so_that_a_model_equals_its_copy():
    starts = []

    class Loader(DataLoader):
        def __iter__(self):
            starts.append(1)
            return super().__iter__()

    shuffled = torch.Generator().manual_seed(0)
    loader = Loader(TensorDataset(draw(96, 12)), batch_size=16, shuffle=True, generator=shuffled)
    found = cka_matrix(TwoCopies(), loader, ["net", "copy"])
    assert found.between("net", "copy") == pytest.approx(1.0, abs=1e-9)
    assert len(starts) == 1


def test_a_generator_of_batches_is_enough():
    found = cka_matrix(TwoCopies(), (batch for batch in draw(32, 12).split(16)), ["net", "copy"])
    assert found.samples == 32


class Backwards(nn.Module):
    """Registers its layers in the opposite order of their use."""

    def __init__(self):
        super().__init__()
        self.third, self.second, self.first = nn.Linear(30, 3), nn.Linear(30, 30), nn.Linear(6, 30)

    def forward(self, x):
        return self.third(self.second(self.first(x).relu()).relu())


def test_names_and_rows_are_both_in_execution_order():
    model, x = Backwards(), draw(64, 6)
    first = model.first(x)
    second = model.second(first.relu())
    third = model.third(second.relu())
    found = cka_matrix(model, [x], "third,second,first")
    assert found.layers == ("first", "second", "third")
    outputs = [first, second, third]
    expected = [[true_cka(a, b) for b in outputs] for a in outputs]
    np.testing.assert_allclose(found.values, expected, atol=1e-6)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.fc = nn.Embedding(50, 6), nn.Linear(6, 5)

    def forward(self, input_ids, attention_mask):
        return torch.tanh(self.fc(self.embed(input_ids)))


def sentences(padded_to, padding):
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 7, (24,), generator=g)
    ids = torch.randint(0, 40, (24, 7), generator=g)
    mask = (torch.arange(padded_to) < lengths[:, None]).long()
    long = torch.nn.functional.pad(ids, (0, padded_to - 7))
    return {"input_ids": torch.where(mask.bool(), long, padding), "attention_mask": mask}


def test_padding_never_counts():
    model = Tokens()
    short, long = (cka_matrix(model, [sentences(*s)], ["embed", "fc"]) for s in ((7, 41), (15, 49)))
    np.testing.assert_allclose(short.values, long.values, atol=1e-6)
    batch = sentences(7, 41)
    keep = batch["attention_mask"].bool()
    tokens = model.embed(batch["input_ids"])
    rows = [torch.stack([t[k].mean(0) for t, k in zip(out, keep, strict=True)]) for out in (tokens, model.fc(tokens))]
    assert short.between("embed", "fc") == pytest.approx(true_cka(*rows), abs=1e-6)


def test_nan_at_a_padded_place_has_no_influence():
    model = Tokens()
    clean = cka_matrix(model, [sentences(9, 41)], ["embed", "fc"])
    with torch.no_grad():
        model.embed.weight[41] = float("nan")
    np.testing.assert_array_equal(cka_matrix(model, [sentences(9, 41)], ["embed", "fc"]).values, clean.values)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("scale", [1e-2, 1e-6, 1e6])
def test_no_epsilon_bends_the_value_of_small_features(scale, kernel):
    x, y = half_alike(n=64, p=20)
    plain, scaled = streamed([x, y, 2 * x], kernel=kernel), streamed([scale * x, scale * y, x], kernel=kernel)
    assert scaled.between("layer0", "layer1") == pytest.approx(plain.between("layer0", "layer1"), abs=1e-6)
    assert scaled.between("layer0", "layer2") == pytest.approx(1.0, abs=1e-6)
    assert scaled.missing == ()


def test_a_value_below_zero_is_not_clamped():
    x, y = torch.tensor([[1.0], [1], [0], [0]]), torch.tensor([[1.0], [0], [1], [0]])
    assert cka(x, y) == pytest.approx(-0.5, abs=1e-9)
    assert streamed([x, y], [x, y]).between("layer0", "layer1") == pytest.approx(-0.5, abs=1e-9)
    signs = [cka(draw(128, 4096, seed=2 * s), draw(128, 4096, seed=2 * s + 1)) < 0 for s in range(8)]
    assert any(signs)
    assert not all(signs)


def test_independent_features_are_about_zero_debiased_and_nearly_one_biased():
    pairs = [(draw(128, 4096, seed=2 * s), draw(128, 4096, seed=2 * s + 1)) for s in range(10)]
    debiased = np.array([cka(x, y) for x, y in pairs])
    assert abs(debiased).max() < 0.05
    assert abs(debiased.mean()) < 0.01
    assert cka(*pairs[0], estimator="biased") == pytest.approx(0.969, abs=0.002)


class Residual(nn.Module):
    """An untrained 12-layer residual encoder."""

    def __init__(self, seed):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            mlps = [nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)) for _ in range(12)]
        self.blocks = nn.ModuleList(mlps)
        self.adds = nn.ModuleList(nn.Identity() for _ in range(12))

    def forward(self, x):
        for block, add in zip(self.blocks, self.adds, strict=True):
            x = add(x + 0.5 * block(x))
        return x


def test_no_absolute_similarity_is_taken_for_a_sign_of_training():
    batches = draw(512, 64).split(64)
    one, other = (cka_matrix(Residual(seed), batches, "adds.*") for seed in (0, 1))
    assert one.values.min() > 0.9
    assert recommend(one, other, resamples=10).verdict == "no supported choice"


def test_minibatch_cka_is_a_ratio_of_means_not_a_mean_of_ratios():
    """The batch at ten times the scale holds 10⁴ times the HSIC, so it decides; a mean of ratios would not know."""
    alike, strange = draw(32, 10), (draw(32, 10, seed=1), draw(32, 10, seed=2))
    found = streamed([alike, alike], [10 * strange[0], 10 * strange[1]]).between("layer0", "layer1")
    apart = true_cka(*strange)
    a, b = (u_centred(t) for t in (alike, 10 * strange[0]))
    c = u_centred(10 * strange[1])
    expected = ((a * a).sum() + (b * c).sum()) / np.sqrt(
        ((a * a).sum() + (b * b).sum()) * ((a * a).sum() + (c * c).sum())
    )
    assert found == pytest.approx(expected, abs=1e-6)
    assert abs(found - (1 + apart) / 2) > 0.3


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_an_autocast_region_does_not_degrade_the_products(kernel):
    x, y = half_alike()
    plain = streamed([x, y], kernel=kernel)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = streamed([x, y], kernel=kernel)
        whole = cka(x, y, kernel=kernel)
    np.testing.assert_array_equal(inside.values, plain.values)
    assert whole == cka(x, y, kernel=kernel)


def test_a_model_run_under_autocast_is_measured_on_its_bf16_outputs():
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32))
    x = draw(96, 64) + 3

    def forward(net, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return net(batch)

    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        first, last = model[0](x), model(x)
    assert first.dtype == torch.bfloat16
    found = cka_matrix(model, [x], ["0", "2"], forward=forward)
    assert found.between("0", "2") == pytest.approx(true_cka(first, last), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("estimator", ["debiased", "biased"])
def test_half_precision_activations_are_computed_in_float32(dtype, estimator):
    x, y = (t.to(dtype) for t in half_alike(p=5000))
    oracle = {"debiased": true_cka, "biased": biased_true_cka}[estimator](x, y)
    assert cka(x, y, estimator=estimator) == pytest.approx(oracle, abs=1e-6)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("estimator", ["debiased", "biased"])
def test_channels_last_gives_the_same_value(kernel, estimator):
    x, y = (t.view(32, 8, 4, 4) for t in half_alike(n=32, p=128))
    options = {"kernel": kernel, "estimator": estimator}
    plain = cka(x, y, **options)
    last = x.contiguous(memory_format=torch.channels_last)
    assert cka(last, y, **options) == pytest.approx(plain, abs=1e-6)
    assert cka(last, y.contiguous(memory_format=torch.channels_last), **options) == pytest.approx(plain, abs=1e-6)


def test_gradients_are_neither_needed_nor_kept():
    x, y = half_alike(n=16, p=8)
    x.requires_grad_()
    state = StreamingCKA(["x", "y"])
    state.update([x, y])
    assert not state._blocks[0].requires_grad
    assert state.compute().between("x", "y") == pytest.approx(true_cka(x, y), abs=1e-6)
