r"""
Shared-prefix attention: every prompt is computed once, and every response once.

The rows of G prompts and their responses are packed into one, `[P_0 | r_00 | r_01 | ... | P_1 | r_10 | ...]`, without
padding. A response's positions continue those of its prompt, and it attends to its prompt and itself alone, so that
hidden states are those of separate rows: K responses of r tokens to a prompt of p cost p + K r tokens instead of
K (p + r).

It is a transformers attention implementation, [`enable_shared_prefix`], and a [`SharedPrefixLayout`] that travels to
it as a keyword argument of the model. Calls without a layout are computed as before, but that eager attention
returns no weights.
"""

from .attention import cannot_share_prefixes, enable_shared_prefix, share_prefixes
from .layout import SharedPrefixLayout, ranges

__all__ = ["SharedPrefixLayout", "cannot_share_prefixes", "enable_shared_prefix", "ranges", "share_prefixes"]
