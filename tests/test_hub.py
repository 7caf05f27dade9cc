"""The Hub: models and adapters are pushed to a server on loopback by the real client, and pulled back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from hub_server import TOKEN, serve_hub
from huggingface_hub import ModelCard
from test_checkpoints import BLOCKED

RUN = Path(__file__).with_name("hub_run.py")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The server, a directory with the scores of what was pushed and pulled, and how to run Python against the two."""
    directory = tmp_path_factory.mktemp("hub")
    with serve_hub() as server:

        def run(*arguments, cache, token=TOKEN):
            environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
            environment |= {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(directory / cache), "HF_TOKEN": token}
            environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "*"}
            command = [sys.executable, *map(str, arguments)]
            run = subprocess.run(command, env=environment, cwd=directory, capture_output=True, text=True, check=False)
            assert run.returncode == 0, run.stderr
            return run.stdout

        run(RUN, directory, cache="pusher")
        yield server, directory, run


def results(directory, command) -> dict:
    return json.loads((directory / f"{command}.json").read_text())


def files_of(server, repo, revision="main") -> dict[str, bytes]:
    return {name: file.content for name, file in server.commits[server.find(repo, revision)].items()}


@pytest.mark.parametrize("name", ["full", "adapter", "trained"])
def test_what_is_pulled_gives_the_scores_of_what_was_pushed(hub, name):
    _, directory, _ = hub
    pushed, pulled = torch.tensor(results(directory, "push")[name]), torch.tensor(results(directory, "pull")[name])
    torch.testing.assert_close(pulled, pushed, rtol=0, atol=1e-6)
    assert pushed.abs().max() > 1e-3


def test_a_revision_is_the_commit_it_names(hub):
    _, directory, _ = hub
    pushed, pulled = results(directory, "push"), results(directory, "pull")
    torch.testing.assert_close(torch.tensor(pulled["older"]), torch.tensor(pushed["older"]), rtol=0, atol=1e-6)
    assert (torch.tensor(pushed["older"]) - torch.tensor(pushed["full"])).abs().max() > 1e-3
    assert pushed["older_commit"] != pushed["full_commit"]


def test_an_unknown_revision_is_an_error_that_names_it(hub):
    assert "no-such-branch" in results(hub[1], "pull")["error"]


def test_repositories_hold_what_they_should(hub):
    server, _, _ = hub
    assert "model.safetensors.index.json" in files_of(server, "someone/full")  # in shards
    assert {"config.json", "model.safetensors", "tokenizer.json", "modeling_gpm.py", "README.md"} <= set(
        files_of(server, "someone/trained")
    )
    adapter = set(files_of(server, "someone/adapter"))
    assert {"adapter_config.json", "adapter_model.safetensors", "config.json", "tokenizer.json"} <= adapter
    assert not any(name.startswith("model") for name in adapter)
    for repo in server.branches:
        assert not any(name.startswith(".saving") for name in files_of(server, repo))
    assert any(request.startswith("PUT /lfs/") for request in server.requests)
    assert not any("xet" in request for request in server.requests)


@pytest.mark.parametrize("name", ["adapter", "trained"])
def test_cards_of_the_trainer_are_pushed(hub, name):
    card = ModelCard(files_of(hub[0], f"someone/{name}")["README.md"].decode())
    assert card.data.datasets == ["someone/rows"]
    assert card.data.base_model == "someone/base"
    assert card.data.license == "apache-2.0"
    assert f'from_pretrained("someone/{name}")' in card.text


def test_a_pushed_model_is_pulled_where_the_package_is_not_installed_if_its_code_is_trusted(hub):
    _, _, run = hub
    ids = torch.tensor([[1, 70, 71, 72, 2], [1, 70, 71, 80, 2]])
    code = f"""
import json
import torch
from transformers import AutoModel
try:
    AutoModel.from_pretrained("someone/full", trust_remote_code=False)
except ValueError as error:
    refusal = str(error)
model = AutoModel.from_pretrained("someone/full", trust_remote_code=True)
output = model(torch.tensor({ids.tolist()}), prompt_lengths=torch.tensor([3, 3]))
print(json.dumps([refusal, output.embeddings.tolist(), output.scales.tolist()]))
"""
    refusal, embeddings, scales = json.loads(run("-c", BLOCKED + code, cache="stranger", token=""))
    assert "trust_remote_code=True" in refusal
    with torch.no_grad():
        output = tiny_model("llama", seed=1)(ids, prompt_lengths=torch.tensor([3, 3]))
    torch.testing.assert_close(torch.tensor(embeddings), output.embeddings)
    torch.testing.assert_close(torch.tensor(scales), output.scales)
