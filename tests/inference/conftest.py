"""The models and tokens of the models' own tests."""

from tests.models.conftest import make_model, tokens

__all__ = ["make_model", "tokens"]
