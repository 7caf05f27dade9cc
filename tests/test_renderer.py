"""Texts to tokens: where the prompt ends, BOS and EOS, tokens that straddle the boundary, rows that are too long."""

import pytest
from conftest import CHAT_TEMPLATE, assistant, user
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, LlamaConfig, PreTrainedTokenizerFast
from trl import RewardConfig, RewardTrainer

from gpm_trl import Renderer
from gpm_trl.cli.quickstart import byte_tokenizer
from gpm_trl.data.formats import prompt_and_responses, template_kwargs
from gpm_trl.data.renderer import RewardModelRenderer, RowTooLongError, cut_end, within_context

TURNS = "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}</s>\n{% endfor %}"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
LLAMA3 = (
    "{% for m in messages %}{{ bos_token if loop.first }}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
)
# Closes the conversation, not the turn, with an EOS.
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
# As PHI3, with an EOS after each answer too.
VICUNA = (
    "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} {% else %}ASSISTANT: {{ m.content }}"
    "{{ eos_token if not loop.last }}{% endif %}{% endfor %}{{ eos_token if not add_generation_prompt }}"
)
# Thinking stays in the assistant turns after the last user turn; the last message always has a think block.
QWEN3 = r"""
{%- if tools %}{{- '<|im_start|>system\n' + tools | map('tojson') | join + '<|im_end|>\n' }}{%- endif %}
{%- set ns = namespace(query=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.query = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- set thought, content = '', message.content %}
    {%- if '</think>' in content and message.role == 'assistant' %}
        {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {%- if message.role == 'assistant' and loop.index0 > ns.query and (loop.last or thought) %}
        {{- '<think>\n' + thought + '\n</think>\n\n' }}
    {%- endif %}
    {{- content + '<|im_end|>\n' }}
{%- endfor %}
"""
LAST_ASSISTANT_THINKS = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>\n"
    "{{ m.content if loop.index0 == ns.last else m.content.split('</think>')[-1] }}</s>\n{% endfor %}"
)
LAST_MESSAGE_THINKS = (
    "{% for m in messages %}<{{ m.role }}>\n{{ m.content if loop.last else m.content.split('</think>')[-1] }}</s>\n"
    "{% endfor %}"
)
NO_USER_LAST = "{% if messages[-1].role == 'user' %}{{ raise_exception('No answer.') }}{% endif %}" + TURNS
NEEDS_USER = (
    "{% if not messages | selectattr('role', 'equalto', 'user') | list %}{{ raise_exception('No user.') }}{% endif %}"
    + TURNS
)
MERGES_TURNS = (
    "{% for m in messages %}{% if loop.first or messages[loop.index0 - 1].role != m.role %}<{{ m.role }}>\n{% endif %}"
    "{{ m.content }}{% if loop.last or messages[loop.index0 + 1].role != m.role %}<end>\n{% endif %}{% endfor %}"
)
THINKING_SWITCH = "<system>\n{{ 'think' if '</think>' in messages[-1].content else 'no_think' }}</s>\n" + TURNS

CORPUS = [
    "the cat sat on the mat",
    "the dog sat on the log",
    "what is two plus two? it is four.",
    "yes no maybe",
    "one\n\ntwo\n\nthree",
] * 5
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
TEXT = st.text(alphabet="the cats on", max_size=12) | st.text(max_size=12)


def message(role, content):
    return {"role": role, "content": content}


def make_tokenizer(template=None, add_bos=False, **special):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    if special:
        tokenizer.add_special_tokens(special)
    if add_bos:
        prepend_bos(tokenizer)
    return tokenizer


def prepend_bos(tokenizer):
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])


def trained(model, pre_tokenizer, decoder, special, **settings):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    trainer = trainers.BpeTrainer(special_tokens=[*SPECIAL.values(), *special], show_progress=False, **settings)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=special[0] if special else None, **SPECIAL)


def merging_tokenizer():
    """Byte-level BPE whose tokens cross spaces, and so the end of a plain-text prompt."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return trained(models.BPE(), level, decoders.ByteLevel(), [], vocab_size=350, initial_alphabet=level.alphabet())


def metaspace_tokenizer(prepend_scheme):
    """SentencePiece-style BPE: spaces are "▁", and one is written before a text."""
    spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    model, level = (
        models.BPE(byte_fallback=True, unk_token="<unk>"),
        pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme),
    )
    return trained(model, level, decoders.Sequence(spaces), special, vocab_size=400)


@pytest.fixture(scope="module", params=["bytes", "merges"])
def any_tokenizer(request):
    tokenizer = byte_tokenizer() if request.param == "bytes" else merging_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def render(tokenizer, prompt, *responses, **template_kwargs):
    """The texts of a prompt and its responses, as the model sees them."""
    prompt_ids, response_ids = Renderer(tokenizer).encode(prompt, responses, **template_kwargs)
    return tokenizer.decode(prompt_ids), *map(tokenizer.decode, response_ids)


# The prompt boundary

THINKING = [user("q"), assistant("<think>t</think>a")]
CONTINUED = MERGES_TURNS.replace("m.content }}", "m.content if loop.last else m.content.split('</think>')[-1] }}")

# The template, the prompt, the responses; then the texts of the prompt and of each response.
BOUNDARIES = [
    (
        (CHATML, [message("system", "s"), user("q")], ["a"]),
        (
            "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n",
            "<|im_start|>assistant\na<|im_end|>\n</s>",
        ),
    ),
    # An EOS that closes the conversation is no part of the prompt, and does not move its end to an earlier one.
    ((PHI3, [user("q")], ["a"]), ("<|user|>\nq<|end|>\n", "<|assistant|>\na<|end|>\n</s>")),
    (
        (VICUNA, [user("q"), assistant("a"), user("r")], ["b"]),
        ("USER: q ASSISTANT: a</s>USER: r ", "ASSISTANT: b</s>"),
    ),
    # Thinking is stripped from earlier turns; a last assistant turn of the prompt has a think block only alone.
    (
        (QWEN3, [*THINKING, user("r")], ["b", "<think>\nu\n</think>\n\nc"]),
        (
            "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n<|im_start|>user\nr<|im_end|>\n",
            "<|im_start|>assistant\n<think>\n\n</think>\n\nb<|im_end|>\n</s>",
            "<|im_start|>assistant\n<think>\nu\n</think>\n\nc<|im_end|>\n</s>",
        ),
    ),
    (
        (QWEN3, [user("q"), assistant("a")], ["b"]),
        (
            "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n",
            "<|im_start|>assistant\n<think>\n\n</think>\n\nb<|im_end|>\n</s>",
        ),
    ),
    ((LAST_ASSISTANT_THINKS, THINKING, ["b"]), ("<user>\nq</s>\n<assistant>\na</s>\n", "<assistant>\nb</s>")),
    # The last message of the prompt may repeat an earlier one.
    (
        (LAST_ASSISTANT_THINKS, [*THINKING, user("q")], ["b"]),
        ("<user>\nq</s>\n<assistant>\na</s>\n<user>\nq</s>\n", "<assistant>\nb</s>"),
    ),
    (
        (LAST_MESSAGE_THINKS, [*THINKING, message("tool", "4")], ["b"]),
        ("<user>\nq</s>\n<assistant>\na</s>\n<tool>\n4</s>\n", "<assistant>\nb</s>"),
    ),
    # Where a template refuses a prompt alone, it ends where the content of the response starts.
    ((NO_USER_LAST, [user("q")], ["a", "0"]), ("<user>\nq</s>\n<assistant>\n", "a</s>", "0</s>")),
    ((CHAT_TEMPLATE, [], ["a", "b"]), ("<s><assistant>\n", "a</s>", "b</s>")),
    # The response continues the last message of the prompt, which may lose its thinking.
    (
        (MERGES_TURNS, [user("q"), assistant("the end")], ["b"]),
        ("<user>\nq<end>\n<assistant>\nthe end", "b<end>\n</s>"),
    ),
    ((CONTINUED, THINKING, ["b"]), ("<user>\nq<end>\n<assistant>\na", "b<end>\n</s>")),
    # A response may be several messages.
    (
        (TURNS, [user("q")], [[assistant("call"), message("tool", "4"), assistant("It is 4.")]]),
        ("<user>\nq</s>\n", "<assistant>\ncall</s>\n<tool>\n4</s>\n<assistant>\nIt is 4.</s>"),
    ),
]


@pytest.mark.parametrize(("conversation", "texts"), BOUNDARIES)
def test_the_prompt_ends_where_the_response_starts(conversation, texts):
    template, prompt, responses = conversation
    assert render(make_tokenizer(template), prompt, *responses) == texts


def test_arguments_reach_the_template():
    tokenizer = make_tokenizer("{{ mood }}:" + QWEN3)
    prompt_text, _ = render(tokenizer, [user("q")], "a", tools=[{"name": "add"}], mood="calm")
    assert prompt_text.startswith('calm:<|im_start|>system\n{"name": "add"}<|im_end|>\n<|im_start|>user')


# Tokens at the boundary


@pytest.mark.parametrize("is_chat", [False, True])
@settings(deadline=None, max_examples=25)
@given(text=TEXT.filter(bool), responses=st.lists(TEXT, min_size=2, max_size=3))
def test_prompt_tokens_do_not_depend_on_the_responses(any_tokenizer, is_chat, text, responses):
    renderer, prompt = Renderer(any_tokenizer), [user(text)] if is_chat else text
    prompt_ids, response_ids = renderer.encode(prompt, responses)
    prompt_text, header = (f"<s><user>\n{text}</s>\n", "<assistant>\n") if is_chat else (text, "")
    for response, ids in zip(responses, response_ids, strict=True):
        assert renderer.encode(prompt, [response]) == (prompt_ids, [ids])
        assert any_tokenizer.decode(prompt_ids) == prompt_text
        assert any_tokenizer.decode(prompt_ids + ids) == f"{prompt_text}{header}{response}</s>"


def test_a_token_that_straddles_the_boundary_is_split_there():
    tokenizer = merging_tokenizer()
    whole, prompt, response = (tokenizer(text).input_ids for text in ("on the mat", "on the", " mat"))
    assert whole[: len(prompt)] != prompt  # "on the " is one token
    assert Renderer(tokenizer).encode("on the", [" mat"]) == (prompt, [[*response, 2]])


def test_a_response_keeps_the_tokens_it_has_after_the_prompt():
    """Tokenized apart, SentencePiece would write a space before it."""
    tokenizer = metaspace_tokenizer("always")
    whole, prompt = tokenizer("the cat\nsat").input_ids, tokenizer("the cat\n").input_ids
    assert whole[: len(prompt)] == prompt
    assert Renderer(tokenizer).encode("the cat\n", ["sat"]) == (prompt, [[*whole[len(prompt) :], 2]])


@pytest.mark.parametrize("scheme", ["always", "first"])
@pytest.mark.parametrize(
    ("prompt", "response"),
    # In the last, a token straddles the boundary.
    [("the cat", " sat"), ("the cat", "\nsat"), ("the cat\n", "sat"), ("the ca", "t")],
)
def test_sentencepiece_writes_no_space_before_a_response(scheme, prompt, response):
    tokenizer = metaspace_tokenizer(scheme)
    prompt_ids, (ids,) = Renderer(tokenizer).encode(prompt, [response])
    assert tokenizer.decode(prompt_ids + ids) == f"{prompt}{response}</s>"


# BOS and EOS


@pytest.mark.parametrize(
    ("template", "add_bos", "prompt", "positions"),
    [
        (TURNS, True, "q", [0]),
        (TURNS, True, [user("q")], [0]),
        (CHAT_TEMPLATE, True, [user("q")], [0]),
        (TURNS, True, "<s>q", [0]),
        (TURNS, False, "q", []),
        (TURNS, False, [user("q")], []),
    ],
)
def test_one_bos_stands_first_where_the_tokenizer_or_the_template_writes_one(template, add_bos, prompt, positions):
    prompt_ids, (ids,) = Renderer(make_tokenizer(template, add_bos)).encode(prompt, ["a"])
    assert [index for index, token in enumerate(prompt_ids + ids) if token == 1] == positions


def test_the_bos_is_the_prompt_where_there_is_no_other():
    assert Renderer(make_tokenizer(add_bos=True)).encode("", [""]) == ([1], [[2]])


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        ("q", "a", "a</s>"),
        ("q", "a</s> \n", "a</s>"),
        ("q", "a</s>b \n", "a</s>b \n</s>"),
        ("q", "a</s> </s>", "a</s>"),
        ([user("q")], "", "<assistant>\n</s>"),
        ([user("q")], "a</s>b", "<assistant>\na</s>b</s>"),
        ([user("q")], [assistant("call"), assistant("4 \n")], "<assistant>\ncall</s>\n<assistant>\n4 \n</s>"),
    ],
)
def test_a_response_ends_in_one_eos(chat_tokenizer, prompt, response, expected):
    assert render(chat_tokenizer, prompt, response)[1] == expected


# Rows that are too long


@pytest.mark.parametrize(
    ("long_rows", "max_length", "prompt_ids", "response_ids", "expected"),
    [
        ("error", 5, [5, 6, 7], [[8, 2], [2]], ([5, 6, 7], [True, True])),
        ("truncate_prompt", None, [5] * 1000, [[2]], ([5] * 1000, [True])),
        ("filter", 5, [5, 6, 7], [[8, 8, 2], [8, 2]], ([5, 6, 7], [False, True])),
        ("truncate_prompt", 4, [1, 5, 6, 7, 8], [[9, 2]], ([1, 8], [True])),  # 1 is the BOS
        ("truncate_prompt", 4, [5, 6, 7], [[9, 9, 9, 9, 2], [9, 2]], ([6, 7], [False, True])),
    ],
)
def test_fit(tokenizer, long_rows, max_length, prompt_ids, response_ids, expected):
    assert Renderer(tokenizer, max_length, long_rows).fit(prompt_ids, response_ids) == expected


def test_the_error_policy_names_the_length_the_limit_and_the_remedy(tokenizer):
    with pytest.raises(ValueError, match=r"6 tokens.*`max_length` = 5.*truncate_prompt"):
        Renderer(tokenizer, 5, "error").fit([5, 6, 7], [[2], [8, 8, 2]])


ROWS = st.lists(st.integers(1, 12).map(lambda length: [9] * (length - 1) + [2]), min_size=1, max_size=4)


@pytest.mark.parametrize("bos", [[1], []])
@settings(deadline=None, max_examples=100)
@given(length=st.integers(1, 12), response_ids=ROWS, max_length=st.integers(2, 16))
def test_truncated_rows_fit_and_keep_as_much_of_the_prompt_as_they_can(
    tokenizer, bos, length, response_ids, max_length
):
    prompt_ids = bos + list(range(10, 10 + length - len(bos)))
    cut_ids, fits = Renderer(tokenizer, max_length, "truncate_prompt").fit(prompt_ids, response_ids)

    least = min(len(prompt_ids), len(bos) + 1)
    assert fits == [least + len(ids) <= max_length for ids in response_ids]
    assert all(len(cut_ids) + len(ids) <= max_length for ids, fit in zip(response_ids, fits, strict=True) if fit)
    assert cut_ids[: len(bos)] == bos
    assert prompt_ids[-len(cut_ids) + len(bos) :] == cut_ids[len(bos) :] or cut_ids == bos
    longest = max((len(ids) for ids, fit in zip(response_ids, fits, strict=True) if fit), default=0)
    assert len(cut_ids) == min(len(prompt_ids), max_length - longest) or not any(fits)


@pytest.mark.parametrize(
    ("ids", "left", "end"),
    [([5, 6, 7, 8], [[8], [7, 8], [6, 7, 8]], [[8], [5, 8], [5, 6, 8]]), ([1, 6, 8], [[1], [1, 8]], [[8], [1, 8]])],
)
def test_cuts_keep_the_bos_or_the_last_token(tokenizer, ids, left, end):
    for cut, kept in ((Renderer(tokenizer).cut_left, left), (cut_end, end)):
        assert [cut(ids, size) for size in range(1, len(ids) + 2)] == [*kept, ids, ids]


# Scoring: nothing is left out


@pytest.mark.parametrize("kind", [Renderer, RewardModelRenderer])
def test_encode_fitting_is_encode_where_rows_fit_and_strings_are_assistant_messages(chat_tokenizer, kind):
    renderer = kind(chat_tokenizer, max_length=50)
    assert renderer.encode_fitting("q" * 40, ["a", "bb"]) == (*renderer.encode("q" * 40, ["a", "bb"]), False)
    messages = renderer.encode([user("q")], [[assistant("a")], [assistant("bb")]])
    assert renderer.encode_fitting([user("q")], ["a", "bb"]) == (*messages, False)


def test_encode_fitting_cuts_the_prompt_once_for_all_responses(tokenizer):
    group = Renderer(tokenizer, max_length=8, long_rows="truncate_prompt").encode_fitting("0123456789", ["a", "bcd"])
    assert group.truncated
    assert tokenizer.decode(group.prompt_ids) == "6789"
    assert [tokenizer.decode(ids) for ids in group.response_ids] == ["a</s>", "bcd</s>"]


@pytest.mark.parametrize(
    ("long_rows", "remedy"),
    [("filter", "allows, or use"), ("error", "allows, or use"), ("truncate_prompt", "though its prompt was cut")],
)
def test_encode_fitting_names_the_first_response_that_is_too_long(tokenizer, long_rows, remedy):
    renderer = Renderer(tokenizer, max_length=8, long_rows=long_rows)
    with pytest.raises(ValueError, match=rf"response 1 has 10 tokens, more than `max_length` = 8.*{remedy}"):
        renderer.encode_fitting("q", ["a", "b" * 8, "c" * 9])


def test_call_gives_what_the_model_takes(tokenizer, model):
    renderer = Renderer(tokenizer, max_length=5, long_rows="truncate_prompt")
    batch = renderer("long q", ["a", "abc"])
    q, a, b, c = tokenizer("qabc").input_ids
    assert batch["input_ids"].tolist() == [[q, a, 2, 2, 2], [q, a, b, c, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["prompt_lengths"].tolist() == [1, 1]
    assert model(**batch).embeddings.shape == (2, 4)


# Errors


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"no EOS token.*set `tokenizer\.eos_token`"):
        Renderer(tokenizer)
    with pytest.raises(ValueError, match="truncate_left"):
        Renderer(byte_tokenizer(), max_length=8, long_rows="truncate_left")


@pytest.mark.parametrize(
    ("template", "prompt", "responses", "error"),
    [
        (None, [user("q")], ["a"], r"no chat template: set `tokenizer\.chat_template`"),
        (None, "", ["a"], "The prompt is empty"),
        (None, "q", "abc", "`responses` is one string"),
        (None, ("q",), ["a"], r"The prompt is \('q',\), but a text is a string, or"),
        (TURNS, "q", [[assistant("a")]], "The response 0 is a list, but the prompt a string"),
        (TURNS, [user("q")], ["a", ["b"]], r"The response 1 is \['b'\], but a text is"),
        (NEEDS_USER, [message("system", "s")], ["a"], r"\['system', 'assistant'\]: No user\.$"),
        ("{{ messages[0].content + 1 }}", [user("q")], ["a"], r"\['user', 'assistant'\]: "),
        # Of several conversations, the refused one is named.
        (NEEDS_USER, [message("system", "s")], [[user("q")], [message("tool", "4")]], "'system', 'tool'"),
        (THINKING_SWITCH, [user("q")], ["a", "<think>t</think>b"], "renders the prompt differently"),
        (THINKING_SWITCH, [user("q")], ["<think>t</think>a", "<think>t</think>b"], "renders the prompt differently"),
    ],
)
def test_what_cannot_be_rendered_is_refused(template, prompt, responses, error):
    with pytest.raises(ValueError, match=error) as raised:
        Renderer(make_tokenizer(template)).encode(prompt, responses)
    assert "\n" not in str(raised.value)


def test_arguments_of_a_template_are_refused_for_plain_text(tokenizer):
    with pytest.raises(ValueError, match="mood would be ignored"):
        Renderer(tokenizer).encode("q", ["a"], mood="calm", tools=None)


# Reward models: as `trl.RewardTrainer` does


PLAIN = [
    {"prompt": "How many? ", "chosen": "Two", "rejected": "Three"},
    {"prompt": "Ends in EOS", "chosen": " yes</s>", "rejected": " no"},
    {"prompt": "", "chosen": "a", "rejected": ""},
]
IMPLICIT = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in PLAIN]
MESSAGES = [
    {"prompt": prompt, "chosen": [assistant("yes ")], "rejected": [assistant("no")], "tools": [{"name": "add"}]}
    for prompt in ([user("q")], [*THINKING, user("r")])
]
IMPLICIT_MESSAGES = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in MESSAGES]


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize(
    ("template", "rows"),
    [
        (None, PLAIN),
        (None, IMPLICIT),
        *((template, MESSAGES) for template in (CHAT_TEMPLATE, CHATML, LLAMA3, GEMMA, PHI3, QWEN3)),
        (QWEN3, IMPLICIT_MESSAGES),
    ],
)
def test_rows_of_a_reward_model_are_tokenized_as_in_its_training(tmp_path, template, rows, add_bos):
    renderer = RewardModelRenderer(make_tokenizer(template, add_bos))
    args = RewardConfig(str(tmp_path), max_length=None, use_cpu=True, bf16=False, report_to="none")
    theirs = RewardTrainer._prepare_dataset(None, Dataset.from_list(rows), renderer.tokenizer, args, "train")
    for row, chosen_ids, rejected_ids in zip(rows, theirs["chosen_ids"], theirs["rejected_ids"], strict=True):
        ours = renderer.encode(*prompt_and_responses(row), **template_kwargs(row))
        assert ours == ([], [chosen_ids, rejected_ids])
        assert ("add" in renderer.tokenizer.decode(chosen_ids)) == (template is QWEN3 and "tools" in row)


@pytest.mark.parametrize("add_bos", [True, False])
def test_rows_of_a_reward_model_are_cut_from_the_left_and_keep_their_bos(add_bos):
    tokenizer = make_tokenizer(add_bos=add_bos)
    renderer = RewardModelRenderer(tokenizer, max_length=6, long_rows="truncate_prompt")
    group = renderer.encode_fitting("0123456789", ["a", "bbb"])
    texts = [tokenizer.decode(ids) for ids in group.response_ids]
    assert texts == (["<s>789a</s>", "<s>9bbb</s>"] if add_bos else ["6789a</s>", "89bbb</s>"])
    assert group.truncated
    assert not renderer.encode_fitting("0", ["a", "b"]).truncated
    with pytest.raises(ValueError, match="though its prompt was cut"):
        renderer.encode_fitting("0123456789", ["a", "b" * 8])
    with pytest.raises(ValueError, match="7 tokens, more than `max_length` = 6"):
        RewardModelRenderer(byte_tokenizer(), max_length=6).encode_fitting("01234", ["", "a"])
    with pytest.raises(RowTooLongError):  # there is no prompt to cut
        renderer.encode_fitting("", ["a", "b" * 8])


def test_rows_are_within_the_context_which_scaled_positions_extend():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    scaled = LlamaConfig(max_position_embeddings=64, rope_parameters=yarn)
    extended = LlamaConfig(max_position_embeddings=256, rope_parameters=yarn)
    for config, context in ((GPT2Config(n_positions=64), 64), (scaled, 256), (extended, 256)):
        assert within_context(50, config) == 50
        assert within_context(1000, config) == within_context(None, config) == context
