# SPDX-License-Identifier: Apache-2.0
"""The C++ language model as an engine for inference; needs nothing but torch."""

import json
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gdn.ops._call import call, make

# Tokens of a prompt that go through the model at once: enough for the chunk form, few enough that the activations of a
# long prompt stay small.
_PREFILL_TOKENS = 2048


class State:
    """What a model remembers of sequences that it has read. Reading on changes it; :meth:`clone` keeps it."""

    def __init__(self, impl: Any) -> None:
        self._impl = impl

    def clone(self) -> "State":
        """A copy with its own memory."""
        return State(self._impl.clone())

    def select(self, sequences: Tensor) -> "State":
        """A new state of these sequences, int64 [M]; one may occur several times."""
        return State(call(self._impl.index, sequences))

    @property
    def num_sequences(self) -> int:
        return self._impl.num_sequences()

    @property
    def nbytes(self) -> int:
        return self._impl.bytes()

    def tensors(self) -> dict[str, Tensor]:
        """The tensors themselves, not copies: "LAYER.mixer.NAME" -> [num_sequences, ...]."""
        return dict(self._impl.tensors())


class CausalLM:
    """A language model that libgdn can load, for inference: ``gdn.CausalLM.from_pretrained(folder)``."""

    def __init__(self, impl: Any, dtype: torch.dtype | None = None) -> None:
        dtype = torch.float32 if dtype is None else dtype
        if dtype not in (torch.float32, torch.bfloat16, torch.float64):
            raise TypeError(f"[CausalLM] dtype must be torch.float32, torch.bfloat16 or torch.float64, got {dtype}")
        self._impl, self.dtype = impl, dtype
        self.config: dict[str, Any] = json.loads(impl.config())
        impl.set_compute_dtype(str(dtype).removeprefix("torch."))
        for t in impl.parameters().values():
            t.requires_grad_(False)
            # Vectors (norms, gates) stay wide: they are small, and the kernels compute with them in float32.
            if t.dim() > 1 or dtype == torch.float64:
                t.data = t.to(dtype)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> "CausalLM":
        """Loads a folder with config.json and model.safetensors, and tokenizer.json where there is one.

        Args:
            folder: what ``gdn train`` or ``save_pretrained`` has written.
            dtype: what the layers compute in: torch.float32 (None), torch.bfloat16 or torch.float64.

        Raises:
            ValueError: the folder holds no model, a broken file, or a model of an unknown type; the message says which.
            TypeError: another dtype.
        """
        return cls(make(torch.classes.gdn.CausalLM, os.fspath(folder), ""), dtype)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes the folder that :meth:`from_pretrained` reads."""
        call(self._impl.save, os.fspath(folder))

    def state_dict(self) -> dict[str, Tensor]:
        """The weights themselves, not copies, by name."""
        return {**self._impl.parameters(), **self._impl.buffers()}

    def zero_state(self, sequences: int = 1) -> State:
        """The state of sequences that have read nothing."""
        return State(call(self._impl.zero_state, sequences))

    @torch.inference_mode()
    def forward(self, input_ids: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """input_ids int64 [B,T] -> logits [B,T,vocab] in float32 (float64 for that dtype).

        Args:
            state: of B sequences, which are read on; it then remembers these tokens too.
            cu_seqlens: int64 [N+1] with B = 1: packed sequences.

        Raises:
            ValueError: not int64 [B,T], ids outside the vocabulary, a state of another number of sequences.
        """
        return self._impl.logits(self._hidden(input_ids, state, cu_seqlens))

    __call__ = forward

    def _hidden(self, ids: Tensor, state: State | None, cu_seqlens: Tensor | None = None) -> Tensor:
        return call(self._impl.hidden, ids, cu_seqlens, None if state is None else state._impl)[0]

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor, state: State) -> Tensor:
        """Reads a prompt [B,T] of any length into `state`; the logits [B,vocab] after its last token."""
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(f"[CausalLM] input_ids must be int64 [B,T] with T >= 1, got {list(input_ids.shape)}")
        for part in input_ids.split(_PREFILL_TOKENS, dim=1):
            hidden = self._hidden(part, state)
        return self._impl.logits(hidden[:, -1])

    def stream(
        self,
        input_ids: Tensor,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        seed: int = 0,
        ignore_eos: bool = False,
        state: State | None = None,
    ) -> Iterator[Tensor]:
        """Generates token by token: yields int64 [B], the next token of each sequence.

        A sequence that has ended repeats its last token; the iteration ends when all have. Arguments as in
        :meth:`generate`.
        """
        if max_new_tokens < 0:
            raise ValueError(f"[CausalLM] max_new_tokens must be at least 0, got {max_new_tokens}")
        B = input_ids.shape[0]
        penalties = (repetition_penalty, presence_penalty, frequency_penalty)
        samplers = [
            make(torch.classes.gdn.Sampler, temperature, top_k, top_p, min_p, *penalties, seed, row) for row in range(B)
        ]
        for sampler, row in zip(samplers, input_ids):
            sampler.add_prompt(row)
        state = self.zero_state(B) if state is None else state
        eos, vocab = self._impl.eos_id(), self._impl.num_tokens()
        logits = self.prefill(input_ids, state)
        tokens = torch.zeros(B, dtype=torch.int64)
        done = [False] * B
        for n in range(max_new_tokens):
            if n > 0:
                with torch.inference_mode():
                    logits = self._impl.logits(self._hidden(tokens[:, None], state)[:, -1])
            tokens = tokens.clone()
            for row, sampler in enumerate(samplers):
                if not done[row]:
                    tokens[row] = call(sampler.next, logits[row, :vocab])
                    done[row] = not ignore_eos and int(tokens[row]) == eos
            yield tokens
            if all(done):
                return

    def generate(
        self, input_ids: Tensor, max_new_tokens: int = 256, temperature: float = 0.0, **options: Any
    ) -> Tensor:
        """Continues prompts of equal length: int64 [B,T] -> int64 [B,T+new].

        Args:
            temperature: 0 takes the most likely token. top_k (0: all), top_p, min_p: of which tokens one is drawn.
            repetition_penalty, presence_penalty, frequency_penalty: as in `gdn generate`.
            seed: equal seeds give equal results; row n draws by (seed, n).
            ignore_eos: go on after the end-of-sequence token.
            state: read on from it; it afterwards remembers everything but the last token.

        Raises:
            ValueError: values that break a rule; the message names it.
        """
        new = [tokens[:, None] for tokens in self.stream(input_ids, max_new_tokens, temperature, **options)]
        return torch.cat([input_ids, *new], dim=1)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text. ValueError where the model folder holds no tokenizer."""
        return call(self._impl.encode, text)

    def decode(self, ids: Tensor | list[int]) -> str:
        """The text of tokens. ValueError where the model folder holds no tokenizer."""
        return call(self._impl.decode, ids.tolist() if isinstance(ids, Tensor) else list(ids))

    def __repr__(self) -> str:
        count = sum(t.numel() for t in self._impl.parameters().values())
        return f"gdn.CausalLM({self.config['model_type']}, {count:,} parameters, {self.dtype})"
