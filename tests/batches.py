"""Models whose batches are not just dim 0 of everything: what people train with pipelines."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class SeqFirst(nn.Module):
    """An encoder in nn.Transformer's own layout: tokens and logits are [length, batch]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
        self.head = nn.Linear(8, 20)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.embedding(tokens)))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """Takes and returns its state, [layers, batch, width]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.rnn = nn.GRU(8, 8, num_layers=2, batch_first=True)
        self.head = nn.Linear(8, 20)

    def forward(self, tokens: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, state = self.rnn(self.embedding(tokens), state)
        return self.head(x), state


class Detector(nn.Module):
    """Returns the rows that score above a threshold: data decide how many."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.head(torch.relu(self.body(x)))
        return y[y[:, 0] > 0]  # type: ignore[no-any-return]


class Images(nn.Module):
    """Takes a list of images, one tensor each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, images: list[torch.Tensor]) -> torch.Tensor:
        x = torch.relu(self.conv(torch.stack(images)))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Shaded(nn.Module):
    """Takes a list of images and one of masks."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)

    def forward(self, images: list[torch.Tensor], masks: list[torch.Tensor]) -> torch.Tensor:
        return self.head(torch.stack(images) * torch.stack(masks))  # type: ignore[no-any-return]


class Positions(nn.Module):
    """The first input, the positions, has no batch; attention goes along the second dim of the other one."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions, self.head = nn.Embedding(20, 8), nn.Embedding(64, 8), nn.Linear(8, 20)

    def forward(self, positions: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions(positions)
        x = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return self.head(x)  # type: ignore[no-any-return]


class Negatives(nn.Module):
    """One sample brings four negatives, sample after sample."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, anchor: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
        others = torch.relu(self.first(negatives)).view(-1, 4, 16)
        return self.last(torch.relu(self.first(anchor)) + others.mean(1))  # type: ignore[no-any-return]


class Patches(nn.Module):
    """The patches of all images of the batch are in a row; tokens say where they go."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.tokens, self.head = nn.Linear(12, 8), nn.Embedding(20, 8), nn.Linear(8, 20)

    def forward(self, tokens: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens)
        x = x.masked_scatter((tokens == 19).unsqueeze(-1), self.tower(patches))
        return self.head(x)  # type: ignore[no-any-return]


class Language(nn.Module):
    """Computes its own loss, and returns a count and a number that is neither a mean nor a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(torch.relu(self.embedding(tokens)))
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {
            "loss": loss + 0.1 * logits.square().mean(),
            "logits": logits,
            "count": (labels > 3).sum(),
            "size": logits.square().mean().sqrt(),
        }


class Pairs(nn.Module):
    """Preference pairs: two inputs that are scored in one go, first all of one and then all of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(torch.cat([chosen, rejected]))))  # type: ignore[no-any-return]


class Towers(nn.Module):
    """Two towers; every query meets every document."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.document = nn.Linear(4, 8), nn.Linear(4, 8)

    def forward(self, query: torch.Tensor, document: torch.Tensor) -> torch.Tensor:
        return self.query(query) @ self.document(document).t()  # type: ignore[no-any-return]


class Pictures(nn.Module):
    """A norm over the batch, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(self.norm(self.conv(x))).mean((2, 3)))  # type: ignore[no-any-return]


class Cached(nn.Module):
    """Keeps the keys of the tokens so far in a buffer, for each sample of the batch, and where they end in another."""

    keys: torch.Tensor
    end: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.register_buffer("keys", torch.zeros(3, 2, 16, 4), persistent=False)
        self.register_buffer("end", torch.zeros(1, dtype=torch.long))

    def forward(self, token: torch.Tensor) -> torch.Tensor:
        x = self.embedding(token).unflatten(-1, (2, 4)).transpose(1, 2)
        self.keys.index_copy_(2, self.end, x)
        self.end.add_(1)
        seen = torch.arange(16, device=token.device)[None] < self.end
        x = F.scaled_dot_product_attention(x, self.keys, self.keys, attn_mask=seen)
        return self.head(x.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Flipped(nn.Module):
    """Returns a number for each sample, those of the last samples first."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x).squeeze(1).flip(0)  # type: ignore[no-any-return]


class Packed(nn.Module):
    """Sequences of several samples in one row; `ends` says where each of them ends."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)

    def forward(self, tokens: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        place = torch.arange(tokens.shape[0])
        sample = torch.bucketize(place, ends, right=True)
        mask = sample[:, None] == sample[None, :]
        x = F.scaled_dot_product_attention(x[None], x[None], x[None], attn_mask=mask)[0]
        return self.head(x)  # type: ignore[no-any-return]


def tokens(*shape: int) -> torch.Tensor:
    """Random tokens."""
    return torch.randint(19, shape)


def with_patches(batch: int, each: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that ask for so many patches in each sample, and the patches."""
    some = tokens(batch, 6)
    some[:, 1 : 1 + each] = 19
    return some, torch.randn(batch * each, 12)


def marks(pipe: Any) -> tuple[list[str], list[str]]:
    """Where the samples are in the inputs and outputs of a pipe, as it is printed; '' where that is not known."""
    inputs = [str(value.type.batch or "") for value in pipe.program.inputs]
    return inputs, [str(value.type.batch or "") for value in pipe.program.outputs]
