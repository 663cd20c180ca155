"What the lesson cells of 30_models do not show: real weights, damaged files, precision, speed, layouts."
import copy
import time
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from hpl_nb import models
from hpl_nb.core import HplError
from hpl_nb.data.core import synthetic

SHARED = Path(__file__).resolve().parents[2]/"shared"
WEIGHTS = SHARED/"weights/resnet50_imagenet_v1.safetensors"
needs_weights = pytest.mark.skipif(not WEIGHTS.is_file(), reason="no ../shared/weights")


@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)


def trunk_file(folder, depth=18, name="trunk.pth", metadata=None, change=lambda state: state):
    "A weights file made of a fresh torchvision ResNet; returns its path and state dict."
    torch.manual_seed(1)
    state = change(torchvision.models.resnet.__dict__[f"resnet{depth}"]().state_dict())
    path = folder/name
    if path.suffix == ".pth": torch.save(state, path)
    else: save_file(state, path, metadata=metadata)
    return path, state


def builders():
    vectors = torch.randn(20, 4)
    return {"mlp": (lambda: models.mlp(5, outputs=2, dropout=.3), torch.randn(4, 5)),
            "small_cnn": (lambda: models.small_cnn(width=4, outputs=2, dropout=.3), torch.randn(4, 1, 16, 16)),
            "resnet": (lambda: models.resnet(18, outputs=2), torch.randn(4, 3, 32, 32)),
            "spectral": (lambda: models.resnet(18, outputs=2, spectral_norm=True), torch.randn(4, 3, 32, 32)),
            "bilstm": (lambda: models.bilstm(vectors, hidden=6, outputs=2), torch.randint(1, 20, (4, 2, 7)))}


@pytest.mark.parametrize("name", ["mlp", "small_cnn", "resnet", "spectral", "bilstm"])
class TestEveryBuilder:
    def test_features_times_head_is_forward(self, name):
        build, x = builders()[name]
        model = build().eval()
        features = model.features(x)
        assert features.shape == (4, model.body.num_features) and features.dtype == torch.float32
        assert_close(model(x), features @ model.head.weight.T + model.head.bias)
        assert model(x).shape == (4, 2)

    def test_seed_decides_the_start(self, name):
        build, _ = builders()[name]
        torch.manual_seed(3)
        first = build().state_dict()
        torch.manual_seed(3)
        second = build().state_dict()
        assert all(torch.equal(first[key], second[key]) for key in first)

    def test_dropout_in_train_only(self, name):
        build, x = builders()[name]
        model = build()
        model.eval()
        assert torch.equal(model(x), model(x))
        for layer in model.modules():  # batch statistics do not change the output within one mode
            if isinstance(layer, nn.BatchNorm2d): layer.momentum = 0.0
        model.train()
        assert not torch.equal(model(x), model(x))

    def test_autocast_keeps_the_head_in_float32(self, name):
        build, x = builders()[name]
        model = build().eval()
        with torch.autocast("cpu", dtype=torch.bfloat16): features, prediction = model.features(x), model(x)
        assert features.dtype == prediction.dtype == torch.float32
        assert_close(prediction, features @ model.head.weight.T + model.head.bias)
        assert_close(prediction, model(x), rtol=.1, atol=.1)

    def test_backward_under_autocast(self, name):
        build, x = builders()[name]
        model = build()
        with torch.autocast("cpu", dtype=torch.bfloat16): model(x).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())

    def test_checkpoint_round_trip(self, name, tmp_path):
        build, x = builders()[name]
        model, other = build(), build()
        torch.save(model.state_dict(), tmp_path/"model.pt")
        other.load_state_dict(torch.load(tmp_path/"model.pt", weights_only=True))
        save_file(copy.deepcopy(model).state_dict(), tmp_path/"model.safetensors")
        assert_close(other.eval()(x), model.eval()(x), rtol=0, atol=0)
        build().load_state_dict(load_file(tmp_path/"model.safetensors"))


def test_double_precision():
    "The closed-form hypergradient is checked in float64: nothing may fall back to float32."
    model = models.mlp(3).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    assert model.features(x).dtype == model(x).dtype == torch.float64


def test_own_backbone_and_plain_linear_head():
    linear = nn.Linear(6, 1)
    model = models.Regressor(nn.Sequential(nn.Linear(2, 6), nn.Tanh()), linear)
    assert model.head.weight is linear.weight and model.head.bias is linear.bias
    assert {name for name, _ in model.head.named_parameters()} == {"weight", "bias"}
    assert model(torch.randn(3, 2)).shape == (3, 1)


@pytest.mark.parametrize("head", [nn.Linear(6, 1, bias=False), nn.ReLU()])
def test_unusable_head(head):
    with pytest.raises(HplError, match="nn.Linear with a bias"): models.Regressor(nn.Identity(), head)


class Residual(nn.Module):
    "A layer that runs twice is no head."
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
    def forward(self, x): return self.layer(torch.tanh(self.layer(x)))


class TestOthersNetworks:
    "As torchvision, timm and nn.Sequential make them."
    @pytest.mark.parametrize("name, layer", [("resnet18", "fc"), ("mobilenet_v3_small", "classifier.3"),
                                             ("efficientnet_b0", "classifier.1")])
    @pytest.mark.parametrize("outputs", [1, 2])
    def test_last_layer_is_the_head(self, name, layer, outputs):
        module, x = getattr(torchvision.models, name)(num_classes=outputs), torch.randn(2, 3, 40, 40)
        before = {key: value.clone() for key, value in module.state_dict().items()}
        model = models.as_regressor(module, (3, 40, 40), outputs)
        assert module.training and all(value.equal(module.state_dict()[key]) for key, value in before.items()) # as it was
        linear = module.get_submodule(layer)
        assert isinstance(linear, nn.Linear) and model.head.weight is linear.weight and model.head.bias is linear.bias
        assert model.features(x).shape == (2, linear.in_features)
        assert_close(model.eval()(x), module.eval()(x), rtol=0, atol=0)
        assert_close(model(x), linear(model.features(x)), rtol=0, atol=0)
        assert {*map(id, model.parameters())} == {*map(id, module.parameters())}
        other = models.as_regressor(getattr(torchvision.models, name)(num_classes=outputs), (3, 40, 40), outputs)
        other.load_state_dict(model.state_dict())
        assert_close(other.eval()(x), model(x), rtol=0, atol=0)

    @pytest.mark.parametrize("module, features", [
        (torchvision.models.resnet18(), 1000), (nn.Sequential(nn.Linear(3, 8), nn.ReLU()), 8), (Residual(), 3),
        (nn.Sequential(nn.Linear(3, 1), nn.ReLU(inplace=True)), 1), (nn.Sequential(nn.Linear(3, 1), nn.Softplus()), 1),
        (nn.Sequential(nn.Linear(3, 6), nn.Unflatten(1, (2, 3))), 6), (nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)), 3)],
        ids=["1000 classes", "hidden", "twice", "in place", "activation", "not flat", "spectral norm"])
    def test_otherwise_the_output_is_the_features(self, module, features):
        pictures = features == 1000
        x, outputs = (torch.randn(2, 3, 40, 40), 1) if pictures else (torch.randn(2, 3), 3 if features == 3 else 1)
        model = models.as_regressor(module, x.shape[1:], outputs).eval()
        assert model.head.in_features == features and model(x).shape == (2, outputs)
        assert_close(model.features(x), module.eval()(x).flatten(1), rtol=0, atol=0)

    def test_small_cases(self):
        "A layer alone, one without a bias, one column that is squeezed away, float64, and a regressor."
        x, linear, bare = torch.randn(5, 3), nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1, bias=False))
        squeezed = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0))
        assert models.as_regressor(linear, (3,), 2)(x).equal(linear(x))
        assert models.as_regressor(bare, (3,))(x).equal(bare(x)) and bare[1].bias is None
        assert models.as_regressor(squeezed, (3,))(x)[:, 0].equal(squeezed(x))
        assert models.as_regressor(nn.Linear(3, 1).double(), (3,))(x.double()).dtype == torch.float64
        assert models.as_regressor(own := models.mlp(3), (3,)) is own

    def test_the_seed_decides_a_new_head(self):
        def made():
            torch.manual_seed(3)
            return models.as_regressor(nn.Sequential(nn.Linear(3, 8), nn.Dropout(.5)), (3,))
        assert made().head.weight.equal(made().head.weight)

    @pytest.mark.parametrize("module, shape, message", [
        (torchvision.models.resnet18(), (1, 28, 30), r"of 3 channels, and these have 1; give X.reshape\(-1, 1, 28, 30\).repeat\(3, "),
        (torchvision.models.resnet18(), (4, 28, 28), "of 3 channels, and these have 4; give a network for 4"),
        (nn.Linear(3, 1), (5,), r"fails on two inputs of shape \(5,\) \(.*\); give a network for this shape"),
        (nn.LSTM(3, 4), (3,), "the network gives a tuple for two inputs"),
        (nn.Sequential(nn.Linear(3, 1), nn.ReLU(), nn.Flatten(0)), (3,), r"the network gives shape \(2,\) for two inputs of shape \(3,\)")])
    def test_refused(self, module, shape, message):
        with pytest.raises(HplError, match=message): models.as_regressor(module, shape)

    def test_timm(self):
        timm = pytest.importorskip("timm")
        for name in ("resnet10t", "mobilenetv3_small_050", "vit_tiny_patch16_224", "convnext_atto"):
            size = 224 if "224" in name else 64
            module, x = timm.create_model(name, num_classes=1), torch.randn(2, 3, size, size)
            model = models.as_regressor(module, (3, size, size)).eval()
            assert model.head.weight is module.get_classifier().weight
            assert_close(model(x), module.eval()(x), rtol=0, atol=0)

    def test_settings_may_build_them(self):
        class Others(models.ModelSettings):
            def network(self, data): return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, data.outputs))
        assert Others().build(synthetic(40)).body.num_features == 5


@pytest.mark.parametrize("depth", [18, 50])
def test_resnet_is_torchvisions(depth):
    theirs = torchvision.models.resnet.__dict__[f"resnet{depth}"]()
    ours = models.resnet(depth, dropout=0.0)
    ours.body.trunk.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")})
    theirs.fc = nn.Identity()
    x = torch.randn(2, 3, 48, 48).contiguous(memory_format=torch.channels_last)
    for mode in (True, False): assert_close(ours.train(mode).features(x), theirs.train(mode)(x), rtol=0, atol=0)


def test_resnet_dropout_places():
    "Four masks: after layer1, layer2, layer3 and before the head (the released code)."
    model, calls = models.resnet(18, dropout=.5), []
    model.body.dropout.register_forward_hook(lambda module, inputs, output: calls.append(tuple(output.shape)))
    model(torch.randn(2, 3, 64, 64))
    assert calls == [(2, 64, 16, 16), (2, 128, 8, 8), (2, 256, 4, 4), (2, 512)]


@pytest.mark.parametrize("name", ["trunk.pth", "trunk.safetensors"])
def test_weights_file(name, tmp_path):
    path, state = trunk_file(tmp_path, name=name)  # has fc.*, which is ignored
    model = models.resnet(18, weights=path)
    loaded = model.body.trunk.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in loaded.items())
    assert models.resnet(18, weights=str(path)).body.strides == "v1.5"


def test_old_file_without_batch_counters(tmp_path):
    path, _ = trunk_file(tmp_path, change=lambda s: {k: v for k, v in s.items() if "num_batches" not in k})
    models.resnet(18, weights=path)


def test_wrong_depth_names_all_three_kinds(tmp_path):
    path, _ = trunk_file(tmp_path, depth=50)
    with pytest.raises(HplError, match=r"trunk.pth.*unexpected: .*misshaped: .*Nothing was loaded") as error:
        models.resnet(18, weights=path)
    assert "layer1.0.conv1.weight (64, 64, 1, 1) instead of (64, 64, 3, 3)" in str(error.value)


@pytest.mark.parametrize("name", ["bad.pth", "bad.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04 torn"])
def test_damaged_file(name, content, tmp_path):
    (tmp_path/name).write_bytes(content)
    with pytest.raises(HplError, match=f"{name} cannot be read"): models.resnet(18, weights=tmp_path/name)


def test_cut_off_files(tmp_path):
    for name in ("trunk.pth", "trunk.safetensors"):
        path, _ = trunk_file(tmp_path, name=name)
        path.write_bytes(path.read_bytes()[:1_000_000])
        with pytest.raises(HplError, match=f"{name} cannot be read"): models.resnet(18, weights=path)


def test_file_is_not_a_flat_state_dict(tmp_path):
    torch.save({"epoch": 3, "state_dict": {}}, tmp_path/"wrapped.pth")
    with pytest.raises(HplError, match="flat state dict"): models.resnet(18, weights=tmp_path/"wrapped.pth")


def test_no_such_file_and_no_such_depth(tmp_path):
    with pytest.raises(HplError, match="does not exist"): models.resnet(18, weights=tmp_path/"no.pth")
    with pytest.raises(HplError, match="depth must be"): models.resnet(20)


def test_download_error(monkeypatch):
    def refuse(*args, **kwargs): raise OSError("no route to host")
    monkeypatch.setattr(torchvision.models, "get_model", refuse)
    with pytest.raises(HplError, match="could not be downloaded.*Path"): models.resnet(18, weights="torchvision")


@needs_weights
def test_shared_weights_have_v1_strides():
    model = models.resnet(50, weights=WEIGHTS).eval()
    block = model.body.trunk.layer2[0]
    assert (model.body.strides, block.conv1.stride, block.conv2.stride) == ("v1", (2, 2), (1, 1))
    stored = load_file(WEIGHTS)
    assert torch.equal(model.body.trunk.layer3[2].conv2.weight, stored["layer3.2.conv2.weight"].float())
    assert model.body.trunk.conv1.weight.dtype == torch.float32
    other = models.resnet(50).eval()  # the strides travel in the state dict
    other.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert_close(other(x), model(x))
    other.body.set_extra_state(torch.tensor(False))
    assert (other(x) - model(x)).abs() > 1e-3 and other.body.strides == "v1.5"


def test_spectral_norm_of_a_resnet():
    model = models.resnet(18, spectral_norm=True)
    for _ in range(3): model(torch.randn(2, 3, 32, 32))
    largest = [torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item()
               for layer in model.body.modules() if isinstance(layer, nn.Conv2d)]
    assert len(largest) == 20 and max(abs(value - 1) for value in largest) < .1
    assert not hasattr(model.head, "parametrizations")


def plain_lstm(body):
    "torch's own bidirectional LSTM with the body's weights."
    first = body.layers[0][0]
    lstm = nn.LSTM(first.input_size, first.hidden_size, len(body.layers), batch_first=True, bidirectional=True)
    lstm.load_state_dict({name.replace("_l0", f"_l{i}{suffix}"): value for i, pair in enumerate(body.layers)
                          for part, suffix in zip(pair, ("", "_reverse")) for name, value in part.state_dict().items()})
    return lstm


class TestBiLSTM:
    def test_padding_changes_nothing(self):
        model = models.bilstm(torch.randn(30, 6), hidden=8).eval()
        pairs = torch.randint(1, 30, (5, 2, 9))
        for row, (a, b) in enumerate([(9, 3), (1, 1), (4, 9), (2, 6), (5, 5)]):
            pairs[row, 0, a:] = 0
            pairs[row, 1, b:] = 0
        together = model.features(pairs)
        assert_close(model.features(nn.functional.pad(pairs, (0, 12))), together)
        for row in range(5): assert_close(model.features(pairs[row:row + 1]), together[row:row + 1])

    def test_matches_a_plain_lstm_per_sentence(self):
        model = models.bilstm(torch.randn(30, 6), hidden=8).eval()
        body, first, second = model.body, torch.tensor([3, 4, 5]), torch.tensor([6, 7])
        lstm = plain_lstm(body)
        u, v = (lstm(body.vectors[ids][None])[0].max(dim=1).values[0] for ids in (first, second))
        pair = torch.stack([first, nn.functional.pad(second, (0, 1))])[None]
        assert_close(model.features(pair)[0], torch.cat([u, v, (u - v).abs(), u*v]))

    def test_gradients_are_those_of_packed_sequences(self):
        body = models.bilstm(torch.randn(30, 6), hidden=8).double().body
        body.vectors = body.vectors.double()
        body.eval()
        ids = torch.randint(1, 30, (17, 12))
        lengths = torch.randint(1, 13, (17,))
        ids[torch.arange(12) >= lengths[:, None]] = 0
        lstm, packed = plain_lstm(body).double(), nn.utils.rnn.pack_padded_sequence
        out = lstm(packed(body.vectors[ids], lengths, batch_first=True, enforce_sorted=False))[0]
        expected = nn.utils.rnn.pad_packed_sequence(out, batch_first=True, padding_value=float("-inf"))[0].max(dim=1).values
        weights = torch.randn_like(expected)
        ours = models.encode_sentences(body, ids)
        assert_close(ours, expected)
        (expected*weights).sum().backward()
        (ours*weights).sum().backward()
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            for layer, pair in enumerate(body.layers):
                for part, suffix in zip(pair, ("", "_reverse")):
                    assert_close(getattr(part, f"{name}_l0").grad, getattr(lstm, f"{name}_l{layer}{suffix}").grad)

    def test_empty_sentence_is_finite(self):
        model = models.bilstm(torch.randn(30, 6), hidden=8)
        assert model(torch.zeros(2, 2, 4, dtype=torch.long)).isfinite().all()

    def test_frozen_vectors(self):
        vectors = torch.randn(30, 6)
        model = models.bilstm(vectors, hidden=8)
        assert not any(p.shape == vectors.shape for p in model.parameters())
        optimiser = torch.optim.Adam(model.parameters(), lr=.1)
        model(torch.randint(1, 30, (4, 2, 5))).sum().backward()
        optimiser.step()
        assert torch.equal(model.body.vectors, vectors)
        assert "body.vectors" not in model.state_dict()

    def test_sizes_of_the_release(self):
        model = models.bilstm(torch.zeros(10, 300))
        assert model.body.num_features == 8192
        assert (len(model.body.layers), model.body.layers[1][0].hidden_size, model.body.dropout.p) == (2, 1024, .2)
        parameters = sum(p.numel() for p in nn.LSTM(300, 1024, 2, bidirectional=True).parameters())
        assert models.count_parameters(model) == {"body": parameters, "head": 8193}

    def test_other_vectors_are_refused(self):
        vectors = torch.randn(30, 6)
        state = models.bilstm(vectors, hidden=8).state_dict()
        models.bilstm(vectors.clone(), hidden=8).load_state_dict(state)
        other = models.bilstm(vectors + 1, hidden=8)
        with pytest.raises(HplError, match="other word vectors"): other.load_state_dict(state)
        with pytest.raises(HplError, match="must have shape"): models.bilstm(vectors[0])


def test_small_cnn_is_fast():
    "Forward and backward of 32 pictures on one thread (a few ms on an idle core; room for a busy one)."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, x = models.small_cnn(), torch.randn(32, 1, 16, 16)
    times = []
    for _ in range(30):
        start = time.perf_counter()
        model(x).mean().backward()
        times.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    assert min(times) < .03
