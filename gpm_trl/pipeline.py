"""The `preference-ranking` pipeline of transformers."""

from typing import Any

from transformers import AutoModel, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

__all__ = ["PreferenceRankingPipeline"]


class PreferenceRankingPipeline(Pipeline):
    r"""
    The task `"preference-ranking"` of [`~transformers.pipeline`]: [`PreferenceScorer`], one prompt at a time. Takes a
    dictionary with `prompt` and `responses` (strings or lists of messages; maybe `tools` and `chat_template_kwargs`),
    or a list of these, and a `method` of [`rank_scores`]. Returns a dictionary for each: that of [`Ranking`].

    Example:

    ```python
    >>> from transformers import pipeline
    >>> import gpm_trl
    >>> ranker = pipeline("preference-ranking", model="path/to/gpm")  # doctest: +SKIP
    >>> ranker({"prompt": "What is 2 + 2?", "responses": ["5", "4"]})["winner"]  # doctest: +SKIP
    1

    ```
    """

    _load_processor = _load_image_processor = _load_feature_extractor = False
    _load_tokenizer = True

    def __init__(self, model, tokenizer=None, **kwargs):
        from .scorer import PreferenceScorer  # here, since it imports datasets, which `import gpm_trl` does not

        super().__init__(model, tokenizer=tokenizer, **kwargs)
        self.scorer = PreferenceScorer(self.model, self.tokenizer)

    def _sanitize_parameters(self, method: str | None = None) -> tuple[dict, dict, dict]:
        return {}, {} if method is None else {"method": method}, {}

    def get_iterator(self, inputs, num_workers, batch_size, *params):
        if batch_size != 1:
            raise ValueError(f"`batch_size` is {batch_size}, but a batch is one prompt: leave it out.")
        return super().get_iterator(inputs, num_workers, batch_size, *params)

    def preprocess(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(inputs, dict) or not {"prompt", "responses"} <= set(inputs):
            raise ValueError(f"Give a dictionary with `prompt` and `responses`, or a list of these; got {inputs!r}.")
        return inputs

    def _forward(self, inputs: dict[str, Any], method: str = "mean"):
        from .data.formats import template_kwargs

        return self.scorer.rank(inputs["prompt"], inputs["responses"], method, template_kwargs(inputs))

    def postprocess(self, ranking) -> dict[str, Any]:
        return ranking.to_dict()


PIPELINE_REGISTRY.register_pipeline("preference-ranking", PreferenceRankingPipeline, AutoModel, type="text")
