"""The Hub: what is pushed is what is pulled. The Hub itself is played by the cache that models are loaded from."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig
from test_checkpoints import LORA, chat_tokenizer, save_base, scores, train


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The directory of a cache; commits to the Hub come as if they had been downloaded."""
    directory = tmp_path / "cache"

    def create_commit(self, repo_id, operations, **kwargs):
        repository = directory / f"models--{repo_id.replace('/', '--')}"
        main, snapshots = repository / "refs" / "main", repository / "snapshots"
        commit = f"{len(list(snapshots.glob('*'))) + 1:040d}"
        if main.exists():
            shutil.copytree(snapshots / main.read_text(), snapshots / commit)
        for operation in operations:
            path = snapshots / commit / operation.path_in_repo
            path.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as file:
                path.write_bytes(file.read())
        main.parent.mkdir(exist_ok=True)
        main.write_text(commit)
        return SimpleNamespace(oid=commit, repo_url=repo_id)

    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(HfApi, "create_repo", lambda hub, repo_id, **kwargs: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(ModelCard, "validate", lambda card, **kwargs: None)  # by the Hub
    # As newer versions of huggingface_hub validate, and where they would not call `create_commit`.
    monkeypatch.setattr(HfApi, "_validate_yaml", lambda *args, **kwargs: None, raising=False)
    monkeypatch.setattr("huggingface_hub.hf_api.is_xet_available", lambda: False, raising=False)
    return directory


def files(cache, repository) -> dict[str, str]:
    directory = cache / f"models--someone--{repository}"
    return {path.name: path for path in (directory / "snapshots" / (directory / "refs/main").read_text()).iterdir()}


def test_a_model_is_pushed_in_shards_and_a_revision_is_the_commit_it_names(cache, tmp_path):
    chat_tokenizer().push_to_hub("someone/full")
    older, newer = tiny_model("llama", seed=0), tiny_model("llama", seed=1)
    commit = older.push_to_hub("someone/full", max_shard_size="50KB").oid
    newer.save_pretrained(tmp_path / "full", push_to_hub=True, repo_id="someone/full", max_shard_size="50KB")
    assert {"model.safetensors.index.json", "modeling_gpm.py", "configuration_gpm.py"} <= set(files(cache, "full"))
    assert torch.equal(scores("someone/full", cache_dir=cache), scores(newer))
    assert torch.equal(scores("someone/full", cache_dir=cache, revision=commit), scores(older))
    assert (scores(older) - scores(newer)).abs().max() > 1e-3


@pytest.mark.parametrize("peft_config", [None, LoraConfig(**LORA)], ids=["full", "adapter"])
def test_the_trainer_pushes_the_model_with_its_tokenizer_and_card(cache, tmp_path, peft_config):
    save_base(tmp_path / "base")
    args = {"hub_model_id": "someone/trained"}
    trainer = train(str(tmp_path / "base"), tmp_path / "trained", args=args, peft_config=peft_config)
    trainer.push_to_hub(dataset_name="someone/rows", license="apache-2.0")
    pushed = files(cache, "trained")
    assert {"config.json", "tokenizer.json"} <= set(pushed)
    assert ("adapter_model.safetensors" in pushed) == (peft_config is not None) == ("model.safetensors" not in pushed)
    assert not any(name.startswith("_saving") for name in pushed)
    card = ModelCard(pushed["README.md"].read_text())
    assert (card.data.datasets, card.data.license) == (["someone/rows"], "apache-2.0")
    assert 'from_pretrained("someone/trained")' in card.text
    torch.testing.assert_close(scores("someone/trained", cache_dir=cache), scores(trainer.model), rtol=0, atol=1e-6)
