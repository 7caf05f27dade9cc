"""`gpm-trl app`: what the page shows, its address, its examples, and a comparison asked of the running page."""

import base64
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from conftest import CHAT_TEMPLATE, lively_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gpm_trl import PreferenceScorer
from gpm_trl.cli import app
from gpm_trl.cli.quickstart import byte_tokenizer

pytest.importorskip("gradio")
ROOT = Path(__file__).parents[1]


@pytest.fixture
def scorer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return PreferenceScorer(lively_model(), tokenizer)


def test_the_strongest_cycle_is_that_with_the_surest_weakest_step():
    order = 1 / (1 + np.exp(-(np.arange(4)[::-1, None] - np.arange(4)[::-1])))
    assert app.strongest_cycle(order) is None
    assert app.strongest_cycle(np.full((3, 3), 0.5)) is None
    rounds = order.copy()
    rounds[0, 2], rounds[2, 0] = 0.3, 0.7  # 0 over 1 over 2 over 0
    assert app.strongest_cycle(rounds) == (0, 1, 2)
    rounds[1, 3], rounds[3, 1] = 0.01, 0.99  # and 1 over 2 over 3 over 1, where the least is 0.73
    assert app.strongest_cycle(rounds) == (1, 2, 3)
    assert app.strongest_cycle(np.full((2, 2), 0.5)) is None


def test_what_is_shown_is_what_the_scorer_says(scorer):
    answers = {"A": "yes", "B": "<b>no</b>", "D": "maybe, or maybe not"}
    shown, figure = app.describe(scorer, "Is it?", answers)
    ranking = scorer.rank([{"role": "user", "content": "Is it?"}], list(answers.values()))
    for i, j in np.ndindex(3, 3):
        assert f"P({'ABD'[i]} over {'ABD'[j]}) = {ranking.probabilities[i, j].item():.4f}" in shown
    rows = re.findall(r"<tr><td>(\d)</td><td>(\w)</td>", shown)
    assert rows == [(str(rank), "ABD"[i]) for rank, i in enumerate(ranking.order, 1)]
    assert "<b>" not in shown
    assert "No cycle" in shown or "A cycle: " in shown
    assert len(figure.axes) == 2  # planes


def test_the_address_holds_the_prompt_and_the_answers():
    values = ["Ünïcode?", "a", "b"] + [""] * 6
    query = base64.urlsafe_b64encode(json.dumps(values).encode()).decode()
    assert app.read_address(query) == values
    for broken in (None, "", "%%%", "bm8=", base64.urlsafe_b64encode(b'{"a": 1}').decode()):
        assert app.read_address(broken) == [""] * 9


def test_examples_are_rows_of_a_file_and_others_are_refused(tmp_path):
    path = tmp_path / "examples.jsonl"
    path.write_text('{"prompt": "p", "responses": ["a", "b"]}\n')
    assert app.read_examples(path) == [["p", "a", "b", *[""] * 6]]
    assert all(len(row) == 9 for row in app.read_examples(None))
    others = ("[]", *(f'{{"prompt": "p", "responses": {what}}}' for what in ('["a"]', '"ab"', "5", "[1, 2]")))
    for line in others:
        path.write_text(line)
        with pytest.raises(ValueError, match=r"examples.jsonl:1: give `prompt` and 2 to 8 `responses`"):
            app.read_examples(path)

    path.write_text('{"prompt": "p"')
    with pytest.raises(ValueError, match=r"examples.jsonl:1: Expecting"):
        app.read_examples(path)


def test_a_prompt_that_is_cut_is_told_on_the_page():
    tokenizer = byte_tokenizer()
    scorer = PreferenceScorer(lively_model(), tokenizer, max_length=12, long_rows="truncate_prompt")
    answers = {"A": "yes", "B": "no"}
    shown, _ = app.describe(scorer, "Is it so, or is it not?", answers)
    assert "The prompt was cut, to 12 tokens with an answer." in shown
    assert "The prompt was cut" not in app.describe(scorer, "Is it?", answers)[0]


def test_models_of_one_name_have_their_whole_names_on_the_page(scorer):
    def titles(*names):
        config = app.make_page(dict.fromkeys(names, scorer), None, app.read_examples(None)).get_config_file()
        values = [one["props"].get("value") for one in config["components"] if one["type"] == "markdown"]
        return [value.removeprefix("### ") for value in values if value.startswith("### ")]

    assert titles("run-a/gpm", "run-b/bt") == ["gpm", "bt"]
    assert titles("run-a/gpm", "run-b/gpm") == ["run-a/gpm", "run-b/gpm"]


def test_gradio_knows_the_picture_for_matplotlibs(scorer):
    import gradio

    _, figure = app.describe(scorer, "Is it?", {"A": "yes", "B": "no"})
    assert gradio.Plot().postprocess(figure).type == "matplotlib"


def test_options_of_samples_need_a_policy(capsys):
    assert app.main(["--model", "a", "--max_new_tokens", "9"]) == 2
    assert "`--max_new_tokens` is of samples: name the `--policy`" in capsys.readouterr().err
    assert app.main(["--model", "a", "--policy", "b", "--max_new_tokens", "0"]) == 2
    assert "`--max_new_tokens` is 0: give 1 or more" in capsys.readouterr().err


def test_answers_are_sampled_from_a_policy_all_of_whose_weights_are_there(decoder, tmp_path):
    answers = list(app.make_sampler(str(decoder), 5, "cpu", None, False)("Is it?", 2))
    assert len(answers) == 2
    policy = AutoModelForCausalLM.from_pretrained(decoder)
    get_peft_model(policy, LoraConfig(r=2)).save_pretrained(tmp_path / "adapter")
    assert len(list(app.make_sampler(str(tmp_path / "adapter"), 5, "cpu", "float32", False)("Is it?", 1))) == 1
    shutil.copytree(decoder, tmp_path / "part")
    weights = load_file(decoder / "model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if "norm" not in name}, tmp_path / "part/model.safetensors"
    )
    with pytest.raises(ValueError, match=r"lacks .*norm"):
        app.make_sampler(str(tmp_path / "part"), 5, "cpu", None, False)


def test_three_models_do_not_fit(capsys):
    assert app.main(["--model", "a", "b", "c"]) == 2
    assert "two fit side by side" in capsys.readouterr().err


@pytest.fixture
def address(scorer):
    """Where a page with two models and a policy runs."""
    page = app.make_page(
        {"a": scorer, "b": scorer}, lambda prompt, count: iter(["x"] * count), app.read_examples(None)
    )
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True)
    yield address
    page.close()


@pytest.mark.slow
def test_the_running_page_compares_and_tells_what_is_missing(scorer, address):
    from gradio_client import Client

    client = Client(address, verbose=False)
    results = client.predict("Is it?", "yes", "no", *[""] * 6, api_name="/compare")
    assert results[0] == results[2] == app.describe(scorer, "Is it?", {"A": "yes", "B": "no"})[0]
    with pytest.raises(Exception, match="at least 2 answers"):
        client.predict("Is it?", "yes", *[""] * 7, api_name="/compare")


@pytest.mark.slow
def test_the_space_serves_the_page_for_the_model_that_its_variable_names(gpm):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    environment = {**os.environ, "MODEL": str(gpm), "GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "0"}
    process = subprocess.Popen([sys.executable, "recipes/space/app.py"], env=environment, cwd=ROOT)
    try:
        for _ in range(120):
            assert process.poll() is None
            with contextlib.suppress(OSError):
                shown = urllib.request.urlopen(f"http://127.0.0.1:{port}/config").read().decode()
                break
            time.sleep(0.5)
    finally:
        process.terminate()
        process.wait()
    assert "Compare" in shown


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-background-networking",
        "window-size=1200,1600",
    ):
        options.add_argument(f"--{argument}")
    options.add_argument(f"--user-data-dir={tmp_path}")
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.mark.slow
def test_in_a_browser_one_types_clicks_reads_and_sends_the_address_on(browser, address):
    def wait(css: str, count: int = 1) -> list:
        for _ in range(100):
            found = browser.find_elements("css selector", css)
            if len(found) >= count and found[0].is_displayed():
                return found
            time.sleep(0.2)
        raise AssertionError(f"{css} is not there")

    browser.get(address)
    for box, text in (("prompt", "Is it?"), ("answer-A", "yes"), ("answer-B", "no"), ("answer-C", "maybe")):
        wait(f"#{box} textarea")[0].send_keys(text)
    wait("#compare")[0].click()
    matrices = wait(".gpm-matrix", 2)
    texts = [matrix.text for matrix in matrices]
    assert texts[0] == texts[1]
    assert all(letter in texts[0] for letter in "ABC")
    hover = wait(".gpm-matrix td")[1].get_attribute("title")
    assert re.fullmatch(r"P\(A over B\) = 0\.\d{4}", hover)
    assert "cycle" in wait(".gpm-cycle")[0].text
    assert wait("[data-testid=matplotlib] img", 2)

    browser.find_elements("css selector", "#more")[0].click()
    wait("#answer-D textarea")[0].send_keys("perhaps")
    wait("#prompt textarea")[0].send_keys("!")  # which hides no box
    time.sleep(1)
    assert wait("#answer-D textarea")[0].is_displayed()

    browser.get(browser.current_url)  # which somebody has been sent
    assert [matrix.text for matrix in wait(".gpm-matrix", 2)] == texts
    assert wait("#answer-C textarea")[0].get_attribute("value") == "maybe"
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
