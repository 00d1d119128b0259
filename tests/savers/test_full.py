"""The real torch, transformers and xgboost; with `scripts/test --full` only."""

import subprocess
import sys

import pytest

torch = pytest.importorskip("torch", reason="installed by scripts/test --full")


def test_torch_save(saved):
    tensors = {f"layer{index}": torch.rand(1000, 1000) for index in range(6)}
    path = saved.folder / "model.pt"
    torch.save(tensors, path)
    saved.check("model.pt")
    for mapped in (False, True):
        loaded = torch.load(path, mmap=mapped)
        assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_transformers_save_pretrained(saved):
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4,
                        intermediate_size=1024, vocab_size=8000)
    model = BertModel(config)
    folder = saved.folder / "model"
    model.save_pretrained(folder, max_shard_size="8MB")
    names = saved.names()
    assert sum(name.endswith(".safetensors") for name in names) > 1
    saved.check(*names)
    loaded = BertModel.from_pretrained(folder)
    pairs = zip(model.state_dict().items(), loaded.state_dict().values())
    assert all(torch.equal(one, other) for (_, one), other in pairs)


def test_mlflow_pytorch(saved, tmp_path):
    import mlflow

    model = torch.nn.Sequential(torch.nn.Linear(4, 2048), torch.nn.Linear(2048, 2))
    path = saved.folder / "model"
    mlflow.pytorch.save_model(model, path, serialization_format="pickle")
    saved.mount.cold()
    loaded = mlflow.pytorch.load_model(path)
    assert torch.equal(loaded(torch.ones(1, 4)), model(torch.ones(1, 4)))
    name = f"savers-{saved.run_id}"
    version = mlflow.register_model(f"runs:/{saved.run_id}/model", name).version
    script = "import sys, mlflow.pyfunc; print(mlflow.pyfunc.load_model(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", script, f"models:/{name}/{version}"],
                   check=True, cwd=tmp_path)


def test_xgboost(saved):
    xgboost = pytest.importorskip("xgboost")
    import numpy

    data = numpy.random.default_rng(0).random((200, 5))
    model = xgboost.XGBRegressor(n_estimators=20).fit(data, data[:, 0])
    model.save_model(saved.folder / "model.ubj")
    saved.check("model.ubj")
    loaded = xgboost.XGBRegressor()
    loaded.load_model(saved.folder / "model.ubj")
    assert numpy.allclose(loaded.predict(data), model.predict(data))


def test_a_model_that_mlflow_pytorch_logs_loads_from_every_path(saved):
    import mlflow

    model = torch.nn.Sequential(torch.nn.Linear(4, 2048), torch.nn.Linear(2048, 2))
    name = f"logged-{saved.run_id}"
    logged = mlflow.pytorch.log_model(model, name="net", registered_model_name=name,
                                      serialization_format="pickle")
    saved.mount.cold()
    models = saved.mount.path / "models"
    for path in [models / logged.model_id, models / name / "1", saved.folder / "net"]:
        loaded = mlflow.pytorch.load_model(f"{path}/")
        assert torch.equal(loaded(torch.ones(1, 4)), model(torch.ones(1, 4))), path
