"""What the user's callbacks keep of a run, in its checkpoints and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as lightning

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.plain_values import PlainEncoder, decode
from orchestrator.runs.messages import warn
from orchestrator.runs.own_parts import blamed

_KEY = "callbacks"  # of state.json


class OwnStates:
    """The states of the user's callbacks, as their `state_dict` gives them.

    Args:
        callbacks: of the user's.
        speaks: whether this process warns of what checkpoints cannot carry.
    """

    def __init__(self, callbacks: Sequence[lightning.Callback], speaks: bool):
        self._callbacks, self._speaks = callbacks, speaks

    def save(self) -> dict[str, Any]:
        """Return what is added to the state of a checkpoint: plain values, and tensors of a few elements.

        Raises:
            PartError: a callback failed.
        """
        encoder = PlainEncoder()
        with blamed(self._callbacks):
            states = {callback.state_key: callback.state_dict() for callback in self._callbacks}
        states = {key: encoder.encode(state, key) for key, state in states.items() if state}
        if encoder.left_out and self._speaks:
            self._speaks = False  # once
            warn(f"checkpoints are portable, and this of callbacks is left out: {'; '.join(encoder.left_out)}")
        return {_KEY: states} if states else {}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Give each callback the state that one of its kind had when `checkpoint` was saved.

        Raises:
            CheckpointError: a state is none that is written here.
            PartError: a callback failed.
        """
        states = checkpoint.state().get(_KEY, {})
        with blamed(self._callbacks):
            for callback in self._callbacks:
                if callback.state_key in states:
                    callback.load_state_dict(decode(states[callback.state_key]))
