"""
`gpm-trl app`: a page to try preference models on, in the browser.

A prompt and two to eight answers, pasted or sampled from a policy; one model, or two side by side: who beats whom, the
ranking, a cycle if there is one, and where the answers are in the model's planes. The address of the page holds what
was compared, so that it can be sent to others. Needs the extra `app`: `pip install "gpm-trl[app]"`.
"""

import argparse
import base64
import html
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import is_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from ..models.loading import load_adapted
from ..scorer import PreferenceScorer
from .arguments import add_model_arguments, command_parser, load_scorer, run_command
from .rows import read_lines

LETTERS = "ABCDEFGH"
FEWEST, MOST = 2, len(LETTERS)  # answers
SHOWN = 3  # boxes for answers at first
EXAMPLES = [
    ["What is 2 + 2?", "4", "5", "Four, I think. But do not rely on me."],
    ["Write a one-line apology for being late.", "Sorry I'm late!", "Traffic.", "I regret nothing.", "I am so sorry."],
]
# What the page does in the browser: write what was compared into its address.
KEEP_IN_ADDRESS = """(...values) => {
    const page = new URL(window.location), bytes = new TextEncoder().encode(JSON.stringify(values));
    page.searchParams.set("q", btoa(String.fromCharCode(...bytes)).replaceAll("+", "-").replaceAll("/", "_"));
    window.history.replaceState(null, "", page);
}"""


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser("app", __doc__)
    what = "directories or Hub ids of one or two general preference or reward models"
    parser.add_argument("--model", required=True, nargs="+", help=what)
    parser.add_argument("--policy", help="directory or Hub id of a causal LM to sample answers from")
    parser.add_argument("--max_new_tokens", type=int, help="of a sample (default: 128)")
    parser.add_argument(
        "--examples", type=Path, help="JSON Lines file of rows with `prompt` and `responses`, to click"
    )
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 is for other machines too (default: %(default)s)")
    parser.add_argument("--port", type=int, help="(default: the first free one from 7860)")
    parser.add_argument("--share", action="store_true", help="a public address for three days, by gradio's server")
    add_model_arguments(parser)
    return parser


# --- What is shown ---------------------------------------------------------------------------------------------------


def strongest_cycle(probabilities: np.ndarray) -> tuple[int, int, int] | None:
    """
    The cycle of three responses whose least probable step is the most probable, if all its steps are above 1/2. A
    longer cycle holds one of three, if no two responses tie.
    """

    def weakest(cycle: tuple[int, ...]) -> float:
        return min(probabilities[i, j] for i, j in zip(cycle, cycle[1:] + cycle[:1], strict=True))

    cycles = [cycle for cycle in permutations(range(len(probabilities)), 3) if cycle[0] == min(cycle)]
    best = max(cycles, key=weakest, default=None)
    return best if best is not None and weakest(best) > 0.5 else None


def describe(scorer: PreferenceScorer, prompt: str, answers: dict[str, str]) -> tuple[str, Any]:
    """What a model says of the answers, by their letters, as HTML; and a picture of them in its planes."""
    from ..plots import plot_embedding_discs

    encoded = scorer.encode(scorer.as_prompt(prompt), list(answers.values()))
    (group,) = scorer.embed_encoded([encoded], show_progress=False)
    ranking, winner = scorer.rank_embedded(group), scorer.rank_embedded(group, "von_neumann").values.tolist()
    probabilities = ranking.probabilities.numpy()
    lengths = [len(scorer.tokenizer(answer, add_special_tokens=False).input_ids) for answer in answers.values()]
    letters = "".join(answers)
    cycle = strongest_cycle(probabilities)
    parts = [f"<p>{html.escape(repr(scorer))}</p>", matrix_table(probabilities, letters)]
    if encoded.truncated:
        parts.insert(1, f"<p>The prompt was cut, to {scorer.renderer.max_length} tokens with an answer.</p>")
    if cycle is None:
        parts.append("<p class='gpm-cycle'>No cycle: the answers are in one order.</p>")
    else:
        parts.append(f"<p class='gpm-cycle'>A cycle: {' over '.join(letters[i] for i in (*cycle, cycle[0]))}.</p>")
    parts.append(ranking_table(ranking.order, ranking.values.tolist(), winner, lengths, letters))
    scales = group.scales if scorer.is_gpm and scorer.model.config.use_scale_gate else None
    figure = plot_embedding_discs(group.embeddings, scales, letters, reward_dim=scorer.reward_dim)
    figure.__module__ = "matplotlib.figure"  # by which gradio tells what to draw, of a class that derives from it too
    return "".join(parts), figure


def matrix_table(probabilities: np.ndarray, letters: str) -> str:
    """P(row is preferred to column): purple above one half, orange below; the digits by hovering."""
    from ..plots import two_digits

    head = "".join(f"<th>{letter}</th>" for letter in letters)
    rows = []
    for i, first in enumerate(letters):
        cells = []
        for j, second in enumerate(letters):
            value = probabilities[i, j]
            colour = f"rgba({'102,51,153' if value > 0.5 else '230,126,34'},{abs(value - 0.5) * 1.6:.2f})"
            hover = f"P({first} over {second}) = {value:.4f}"
            shown = "" if i == j else html.escape(two_digits(value))
            cells.append(f"<td title='{hover}' style='background:{colour}'>{shown}</td>")
        rows.append(f"<tr><th>{first}</th>{''.join(cells)}</tr>")
    caption = "<caption>P(row is preferred to column)</caption>"
    return f"<table class='gpm-matrix'>{caption}<tr><th></th>{head}</tr>{''.join(rows)}</table>"


def ranking_table(
    order: Sequence[int], values: Sequence[float], winner: Sequence[float], lengths: Sequence[int], letters: str
) -> str:
    """The answers, the best first: mean preference, share in the von Neumann winner, tokens."""
    head = "<tr><th>rank</th><th>answer</th><th>mean preference</th><th>von Neumann winner</th><th>tokens</th></tr>"
    rows = [
        f"<tr><td>{rank}</td><td>{letters[i]}</td><td>{values[i]:+z.2f}</td><td>{winner[i]:.2f}</td><td>{lengths[i]}</td></tr>"
        for rank, i in enumerate(order, start=1)
    ]
    return f"<table class='gpm-ranking'>{head}{''.join(rows)}</table>"


# --- The page --------------------------------------------------------------------------------------------------------


def read_address(query: str | None) -> list[str]:
    """The prompt and the answers that the address of the page holds, if it does."""
    try:
        values = json.loads(base64.urlsafe_b64decode(query or ""))
    except ValueError:
        values = []
    texts = [value for value in values if isinstance(value, str)] if isinstance(values, list) else []
    return (texts + [""] * (MOST + 1))[: MOST + 1]


def read_examples(path: Path | None) -> list[list[str]]:
    """Rows of a prompt and its answers, filled up; raises `ValueError` for a row that is none."""
    rows = EXAMPLES
    if path is not None:
        rows = []
        for number, line in read_lines(path):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from error
            is_row = isinstance(row, dict) and isinstance(row.get("responses"), list)
            texts = [row.get("prompt"), *row["responses"]] if is_row else []
            if not FEWEST < len(texts) <= MOST + 1 or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{path}:{number}: give `prompt` and {FEWEST} to {MOST} `responses`, all strings.")
            rows.append(texts)
    return [row + [""] * (MOST + 1 - len(row)) for row in rows]


def make_sampler(
    name: str, max_new_tokens: int, device: str | None, dtype: str | None, trust_remote_code: bool
) -> Callable[[str, int], Iterator[str]]:
    """A function that samples answers of a policy to a prompt, one after the other."""
    given = {"trust_remote_code": trust_remote_code}
    model = load_adapted(AutoModelForCausalLM.from_pretrained, name, dtype=dtype, **given)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **given)
    except (OSError, ValueError):
        if not is_peft_model(model):
            raise
        tokenizer = AutoTokenizer.from_pretrained(model.get_base_model().name_or_path, **given)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device=device)

    def sample(prompt: str, count: int) -> Iterator[str]:
        is_chat = generator.tokenizer.chat_template is not None
        text = [{"role": "user", "content": prompt}] if is_chat else prompt
        for _ in range(count):
            (found,) = generator(text, max_new_tokens=max_new_tokens, do_sample=True, return_full_text=False)
            yield found["generated_text"].strip()

    return sample


def make_page(models: dict[str, PreferenceScorer], sample: Callable | None, examples: list[list[str]]):
    """The page, a `gradio.Blocks`."""
    import gradio as gr

    def compare(prompt: str, *answers: str, progress=gr.Progress()) -> list:  # noqa: B008, gradio wants it there
        given = {letter: answer for letter, answer in zip(LETTERS, answers, strict=True) if answer.strip()}
        if not prompt.strip() or len(given) < FEWEST:
            raise gr.Error(f"Write a prompt, and at least {FEWEST} answers.", print_exception=False)
        results = []
        for number, scorer in enumerate(models.values()):
            progress(number / len(models), desc="Comparing")
            try:
                shown, figure = describe(scorer, prompt, given)
            except ValueError as error:  # too long, not finite, ...
                raise gr.Error(str(error), print_exception=False) from error
            results += [shown, gr.update(value=figure, visible=True)]
        return results

    def compare_loaded(prompt: str, *answers: str) -> list:
        return compare(prompt, *answers) if prompt else [gr.skip()] * (2 * len(models))

    def sample_answers(prompt: str, *answers: str, progress=gr.Progress()) -> list:  # noqa: B008, gradio wants it there
        if not prompt.strip():
            raise gr.Error("Write a prompt first.", print_exception=False)
        given = [answer for answer in answers if answer.strip()]
        count = min(max(SHOWN - len(given), 1), MOST - len(given))
        for number, answer in enumerate(sample(prompt, count)):
            progress((number + 1) / count, desc="Sampling")
            given.append(answer)
        return given + [""] * (MOST - len(given))

    def show(count: int) -> list:
        """So many boxes, and how many these are."""
        return [count, *(gr.update(visible=index < count) for index in range(MOST))]

    def add_box(count: int) -> list:
        return show(min(count + 1, MOST))

    def reveal(count: int, *answers: str) -> list:
        return show(max([count, *(index for index, answer in enumerate(answers, 1) if answer)]))

    def load(request: gr.Request) -> list[str]:
        return read_address(request.query_params.get("q"))

    names = [Path(name).name for name in models]
    titles = names if len({*names}) == len(names) else [*models]
    with gr.Blocks(title="gpm_trl", analytics_enabled=False) as page:
        gr.Markdown(
            "# Which answer is preferred?\nA prompt, two to eight answers, and what preference models say of them."
        )
        prompt = gr.Textbox(label="Prompt", lines=2, elem_id="prompt")
        answers = [
            gr.Textbox(label=f"Answer {letter}", lines=2, visible=index < SHOWN, elem_id=f"answer-{letter}")
            for index, letter in enumerate(LETTERS)
        ]
        boxes, count = [prompt, *answers], gr.State(SHOWN)
        counted = [count, *answers]
        with gr.Row():
            more = gr.Button("One more answer", elem_id="more")
            sampled = gr.Button("Sample answers", visible=sample is not None)
            go = gr.Button("Compare", variant="primary", elem_id="compare")
        outputs = []
        with gr.Row():
            for title in titles:
                with gr.Column():
                    gr.Markdown(f"### {html.escape(title)}")
                    outputs += [gr.HTML(elem_classes="gpm-model"), gr.Plot(show_label=False, visible=False)]
        gr.Examples(examples, boxes, label="Examples")
        more.click(add_box, count, counted, show_progress="hidden")
        if sample is not None:
            sampled.click(sample_answers, boxes, answers).then(reveal, counted, counted, show_progress="hidden")
        prompt.change(reveal, counted, counted, show_progress="hidden")  # an example, or an address
        go.click(None, boxes, None, js=KEEP_IN_ADDRESS)
        drawing = {"concurrency_id": "drawing"}  # one at a time: matplotlib's styles are the process's
        go.click(compare, boxes, outputs, api_name="compare", **drawing)
        page.load(load, None, boxes).then(compare_loaded, boxes, outputs, **drawing)
    return page


CSS = """
.gpm-matrix td, .gpm-matrix th, .gpm-ranking td, .gpm-ranking th { padding: .3em .6em; text-align: center; }
.gpm-matrix caption { text-align: left; font-size: .9em; }
.gpm-cycle { font-weight: bold; margin: .6em 0; }
"""


def serve(args: argparse.Namespace) -> None:
    """Load the models, and serve the page until it is interrupted."""
    try:
        import gradio  # noqa: F401

        from .. import plots  # noqa: F401
    except ImportError as error:
        raise ImportError('`gpm-trl app` needs gradio and matplotlib: `pip install "gpm-trl[app]"`.') from error
    if len(args.model) > 2:
        raise ValueError(f"`--model` names {len(args.model)} models, but two fit side by side.")
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise ValueError(f"`--max_new_tokens` is {args.max_new_tokens}: give 1 or more.")
    if args.max_new_tokens is not None and not args.policy:
        raise ValueError("`--max_new_tokens` is of samples: name the `--policy` that they are from, or leave it out.")
    examples = read_examples(args.examples)
    models = {name: load_scorer(name, args, long_rows="truncate_prompt") for name in args.model}
    loading = (args.max_new_tokens or 128, args.device, args.dtype, args.trust_remote_code)
    page = make_page(models, make_sampler(args.policy, *loading) if args.policy else None, examples)
    page.queue().launch(server_name=args.host, server_port=args.port, share=args.share, css=CSS)


def main(argv: list[str] | None = None) -> int:
    return run_command(make_parser(), serve, argv)


if __name__ == "__main__":
    sys.exit(main())
