"""Real templates and tokenizers: rows are what TRL's reward trainer tokenizes, but for how they end."""

import pytest
from conftest import assistant, user
from datasets import Dataset
from trl import RewardConfig, RewardTrainer

from gpm_trl.data.renderer import Renderer, RewardModelRenderer

from .parts import real_tokenizer

pytestmark = pytest.mark.real

# How often BOS stands in a conversation and in plain text. SmolLM2's begins every turn, so it is not counted.
BOS = {
    "llama3_1": (1, 1),
    "gemma3": (1, 1),
    "qwen3": (0, 0),
    "deepseek_v3": (1, 0),
    "smollm2-135m": (None, 0),
    "gemma3-270m": (None, 1),
    "llama2": (None, 1),
    "gptoss": (None, 0),
}
WITHOUT_TEMPLATE = ("gemma3-270m", "llama2", "gptoss")
WITH_TEMPLATE = [name for name in BOS if name not in WITHOUT_TEMPLATE]
SYSTEM = {"role": "system", "content": "Answer in one word."}
PROMPTS = {
    "one turn": [user("What is 2 + 2?")],
    "several turns": [user("Hi!"), assistant("Hello. What can I do?"), user("Name a colour.")],
    "a system message": [SYSTEM, user("Name a colour.")],
    "a system message and several turns": [SYSTEM, user("Hi!"), assistant("Hello."), user("Name a colour.")],
    "odd contents": [user("  Où est 东京? 👩‍👩‍👧 e\u0301 \u200f\n\n"), assistant(""), user("\tAnd\u00a0now?\r\n ")],
}
RESPONSES = ["Four.", "", " ", "a\n\n", "  two  spaces", "Grüße, 世界 👋🏽 e\u0301", "x" * 300, "\n```py\n1\n```\n"]


def trl_rows(name: str, prompt: str | list, responses: list, directory) -> list[list[int]]:
    """The token ids of each response after the prompt in TRL's training of a reward model."""
    answers = responses if isinstance(prompt, str) else [[assistant(text)] for text in responses]
    rows = [{"prompt": prompt, "chosen": answer, "rejected": answer} for answer in answers]
    args = RewardConfig(str(directory), max_length=None, use_cpu=True, bf16=False, report_to="none")
    stream = Dataset.from_list(rows).to_iterable_dataset()  # or a hash is made of the tokenizer, which takes seconds
    dataset = RewardTrainer._prepare_dataset(None, stream, real_tokenizer(name), args, "train")
    return [row["chosen_ids"] for row in dataset]


def with_one_eos(tokenizer, ids: list[int]) -> list[int]:
    """A row that ends in EOS and nothing else: without the white space that a template writes after EOS."""
    end = len(ids)
    while end > 0:
        last = end - 1
        while last > 0 and ids[last] != tokenizer.eos_token_id and not tokenizer.decode(ids[last]).strip():
            last -= 1
        if ids[last] != tokenizer.eos_token_id:
            break
        end = last
    return [*ids[:end], tokenizer.eos_token_id]


def check_rendering(name: str, prompt: str | list, responses: list[str], directory, num_bos: int | None):
    tokenizer = real_tokenizer(name)
    theirs = trl_rows(name, prompt, responses, directory)
    assert RewardModelRenderer(tokenizer).encode(prompt, responses) == ([], theirs)

    renderer = Renderer(tokenizer)
    prompt_ids, response_ids = renderer.encode(prompt, responses)
    for response, ids, their_ids in zip(responses, response_ids, theirs, strict=True):
        assert renderer.encode(prompt, [response]) == (prompt_ids, [ids])
        row, expected = prompt_ids + ids, with_one_eos(tokenizer, their_ids)
        # TRL lets a token of plain text straddle the end of the prompt; here the two sides are tokenized apart.
        if their_ids[: len(prompt_ids)] == prompt_ids:
            assert row == expected
        else:
            assert isinstance(prompt, str)
            assert tokenizer.decode(row) == tokenizer.decode(expected)
        assert ids[-1] == tokenizer.eos_token_id
        if num_bos is not None:
            assert row.count(tokenizer.bos_token_id) == num_bos


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("name", WITH_TEMPLATE)
def test_a_conversation_is_what_trl_tokenizes(name, kind, tmp_path):
    eos = real_tokenizer(name).eos_token
    responses = [*RESPONSES, f"before{eos}after", f"the end{eos}", eos]
    check_rendering(name, PROMPTS[kind], responses, tmp_path, num_bos=BOS[name][0])


@pytest.mark.parametrize("prompt", ["Question: what is 2 + 2?\nAnswer:", "Où est 东京? 👩‍👩‍👧\n\n", "a", " "])
@pytest.mark.parametrize("name", BOS)
def test_plain_text_is_what_trl_tokenizes(name, prompt, tmp_path):
    eos = real_tokenizer(name).eos_token
    check_rendering(name, prompt, [*RESPONSES, f"before{eos}after"], tmp_path, num_bos=BOS[name][1])


@pytest.mark.parametrize("name", WITHOUT_TEMPLATE)
def test_a_tokenizer_without_a_template_refuses_conversations(name):
    with pytest.raises(ValueError, match="no chat template"):
        Renderer(real_tokenizer(name)).encode(PROMPTS["one turn"], ["a"])


def test_what_a_template_refuses_is_refused():
    """Gemma's wants the roles to alternate."""
    with pytest.raises(ValueError, match=r"refuses a conversation with the roles \['user', 'user', 'assistant'\]"):
        Renderer(real_tokenizer("gemma3")).encode([user("a"), user("b")], ["c"])
