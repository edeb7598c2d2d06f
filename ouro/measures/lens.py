"""Readouts inside the steps: the logit lens and a tuned one."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ouro.labelled import LabelledSet
from ouro.measures.rank import rank_of, single_token
from ouro.measures.source import SLAB, captured, labelled, log_softmax, seen_coords
from ouro.model import Batch, Model


def rms_norm(x: ArrayLike, weight: ArrayLike, eps: float) -> NDArray[np.float32]:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis, as the model norms the residual into the state of a step."""
    a = np.asarray(x, np.float64)
    return np.asarray(a / np.sqrt((a * a).mean(-1, keepdims=True) + eps) * np.asarray(weight), np.float32)


def ridge(x: ArrayLike, y: ArrayLike, alpha: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`A, b` of the least `sum |x A + b - y|^2 + alpha n mean_i(var x_i) |A|^2`; b is not shrunk.

    Parameters
    ----------
    x : array [sample, d]
    y : array [sample, k]
    alpha
        Strength relative to the mean variance of a column of x: without a unit.

    Returns
    -------
    A : array [d, k]
    b : array [k]
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    mx, my = x.mean(0), y.mean(0)
    xc, yc = x - mx, y - my
    gram = xc.T @ xc
    gram[np.diag_indices_from(gram)] += alpha * np.trace(gram) / len(gram) + 1e-12
    a = np.linalg.solve(gram, xc.T @ yc)
    return a, my - mx @ a


class TunedLens:
    """A map for each (step, layer) from the normed stream inside a step to the state after the last step.

    `state_hat = u + u A + b`, u the normed stream; A and b by ridge regression of `state - u` on u, so that a strong `alpha`
    leaves the plain logit lens with an offset. (Belrose et al. train the same affine maps on the divergence of the readouts.)

    Parameters
    ----------
    alpha : float
        Strength of the ridge, relative to the variance of u.

    Attributes
    ----------
    weight_ : array [step, layer, d_model, d_model], float32
        A. 4 d^2 bytes each: 1.6 GB for the 96 places of the 1.4B model.
    bias_ : array [step, layer, d_model]
    n_tokens_ : int
        Tokens that were fitted on; with fewer than d_model the ridge alone decides.

    Source
    ------
    Belrose et al., "Eliciting latent predictions from transformers with the tuned lens", arXiv 2303.08112, equation 8.

    Examples
    --------
    >>> import ouro
    >>> from ouro.measures import TunedLens, logit_lens
    >>> model = ouro.load("ouro-tiny")
    >>> lens = TunedLens(alpha=0.1).fit(model, ["One day Ann took the cup to the cave.", "Bob is the boss of Cid."])
    >>> logit_lens(model, "One day Ann took", tuned=lens)["kl"].shape
    (4, 4, 1, 5)
    """

    def __init__(self, alpha: float = 0.1) -> None:
        self.alpha = alpha

    def fit(self, model: Model, x: Batch | Any, *, n_steps: int | None = None) -> TunedLens:
        """Fit on texts, ids, or a cache with `resid_post` and `state`. Returns self."""
        cache = captured(model, x, ["resid_post", "state"], n_steps=n_steps)
        rows, places = np.nonzero(~np.isnan(cache["state"][-1, ..., 0]))
        return self.fit_arrays(_streams(model, cache, rows, places), cache["state"][-1, rows, places])

    def fit_arrays(self, streams: ArrayLike, final: ArrayLike) -> TunedLens:
        """Fit on normed streams `[step, layer, sample, d_model]` and final states `[sample, d_model]`. Returns self."""
        if not self.alpha >= 0:
            raise ValueError(f"alpha is {self.alpha}, expected 0 or more")
        u, y = np.asarray(streams), np.asarray(final)
        steps, layers, self.n_tokens_, d = u.shape
        self.weight_ = np.empty((steps, layers, d, d), np.float32)
        self.bias_ = np.empty((steps, layers, d), np.float32)
        for t in range(steps):
            for layer in range(layers):
                self.weight_[t, layer], self.bias_[t, layer] = ridge(u[t, layer], y - u[t, layer], self.alpha)
        return self

    def apply(self, streams: ArrayLike) -> NDArray[np.float32]:
        """`u + u A + b` of normed streams `[step, layer, ..., d_model]`."""
        if not hasattr(self, "weight_"):
            raise ValueError("this TunedLens is not fitted: call fit(model, texts) first")
        u = np.asarray(streams, np.float32)
        if u.shape[:2] != self.weight_.shape[:2]:
            raise ValueError(f"streams of {u.shape[:2]} steps and layers, the lens was fitted on {self.weight_.shape[:2]}")
        moved = np.einsum("tl...d,tlde->tl...e", u, self.weight_, optimize=True)
        bias = self.bias_.reshape(*self.bias_.shape[:2], *(1,) * (u.ndim - 3), -1)
        return np.asarray(u + moved + bias, np.float32)


def _streams(model: Model, cache: Any, rows: NDArray[np.intp], places: NDArray[np.intp]) -> NDArray[np.float32]:
    """The stream behind each layer, normed `[step, layer, row, d]`, at some (batch, pos); behind the last layer the state itself,
    bit for bit."""
    normed = rms_norm(cache.stack("resid_post")[:, :, rows, places], model.weight("model.norm.weight"), model.config.eps)
    normed[:, -1] = cache.stack("state")[:, rows, places]
    return normed


def logit_lens(
    model: Model,
    x: Batch | Any,
    *,
    tuned: TunedLens | None = None,
    token: int | str | None = None,
    n_steps: int | None = None,
) -> LabelledSet:
    """What each layer of each step would say if the step ended there.

    `z = W_head RMS(stream behind layer l; norm)`. Behind the last layer this is the model's own readout of the step (exact);
    before it a reading that the model never makes: the coordinate `approximate` over layers says which is which. The text of
    `top` is the coordinate `top_token`; `logit_lens(...)["probability"].plot()` draws it token by token.

    Arrays `[step, layer, batch, pos]`:

    | name | formula |
    |---|---|
    | top, probability | most likely token (-1 beyond a sequence) and its probability |
    | entropy | of the readout, nats |
    | kl | `KL(p_last || p)`, p_last the readout after the last step, nats |
    | rank, logprob | of `token`, or of the token that follows in the text; 0 is the top; NaN where none follows |

    Parameters
    ----------
    model
    x
        Texts or ids, or a cache with `resid_post` and `state`.
    tuned
        A fitted `TunedLens` to read through; then only the last step's end is exact when its map is the identity.
    token
        An id, or a text that is one token.
    n_steps
        Recurrent steps to run.

    Raises
    ------
    TypeError, KeyError
        As `angular_distance`, of `resid_post` or `state`.
    ValueError
        For a token that is several or does not exist, or a lens fitted on other steps or layers, or not fitted.

    Notes
    -----
    Readouts are made a few positions at a time: beside the captured streams (`steps * layers * 4 * d_model` bytes a token, 0.75 MiB for
    the 1.4B model) it takes about 0.1 GiB, however long the text.

    Source
    ------
    nostalgebraist, "interpreting GPT: the logit lens" (2020); tuned: Belrose et al., arXiv 2303.08112.

    Examples
    --------
    >>> import ouro
    >>> from ouro.measures import logit_lens
    >>> found = logit_lens(ouro.load("ouro-tiny"), "One day Ann took", token=" the")
    >>> found["rank"].dims, found["rank"].coords["approximate"].tolist()
    (('step', 'layer', 'batch', 'pos'), [True, True, True, False])
    """
    cache = captured(model, x, ["resid_post", "state"], n_steps=n_steps)
    wanted = _wanted(model, cache, token)
    shape = (len(cache.steps("resid_post")), len(cache.layers("resid_post")), *cache.positions.shape)
    out = {n: np.full(shape, np.nan) for n in ("top", "probability", "entropy", "kl", "rank", "logprob")}
    rows, places = np.nonzero(~np.isnan(cache["state"][0, ..., 0]))
    slab = max(1, SLAB // (model.config.d_vocab * shape[0] * shape[1]))
    for begin in range(0, len(rows), slab):
        b, i = rows[begin : begin + slab], places[begin : begin + slab]
        streams = _streams(model, cache, b, i)
        read = _read(model, streams if tuned is None else tuned.apply(streams))
        for name, values in _read_out(read, log_softmax(_read(model, cache["state"][-1, b, i])), wanted[b, i]).items():
            out[name][:, :, b, i] = values
    return _labelled_lens(model, cache, out, tuned is not None)


def _read_out(z: NDArray[np.float32], final: NDArray[np.float64], wanted: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    """The arrays of `logit_lens` from logits `[step, layer, row, d_vocab]`, the last log probabilities `[row, d_vocab]` and the
    tokens to follow `[row]`; one (step, layer) at a time, so that float64 copies stay small."""
    out = {n: np.full(z.shape[:-1], np.nan) for n in ("top", "probability", "entropy", "kl", "rank", "logprob")}
    ids, follows, p_final = np.maximum(wanted, 0), wanted >= 0, np.exp(final)
    for at in np.ndindex(z.shape[:2]):
        log_p = log_softmax(z[at])
        p = np.exp(log_p)
        out["top"][at], out["probability"][at], out["entropy"][at] = log_p.argmax(-1), p.max(-1), -(p * log_p).sum(-1)
        out["kl"][at] = (p_final * (final - log_p)).sum(-1)
        out["rank"][at] = np.where(follows, rank_of(log_p, ids), np.nan)
        out["logprob"][at] = np.where(follows, np.take_along_axis(log_p, ids[:, None], -1)[:, 0], np.nan)
    return out


def _read(model: Model, states: NDArray[np.float32]) -> NDArray[np.float32]:
    flat = np.ascontiguousarray(states.reshape(-1, states.shape[-1]))
    z: NDArray[np.float32] = model._core.readout(flat, True)[0]
    return z.reshape(*states.shape[:-1], -1)


def _wanted(model: Model, cache: Any, token: int | str | None) -> NDArray[np.int64]:
    """The token to follow at each captured place `[batch, pos]`; -1 where none does."""
    if token is not None:
        return np.full(cache.positions.shape, single_token(model, token), np.int64)
    out = np.full(cache.positions.shape, -1, np.int64)
    for row, ids in enumerate(cache.token_ids):
        for place, i in enumerate(cache.positions[row]):
            if 0 <= i < len(ids) - 1:
                out[row, place] = ids[i + 1]
    return out


def _labelled_lens(model: Model, cache: Any, out: dict[str, NDArray[np.float64]], tuned: bool) -> LabelledSet:
    layers = out["top"].shape[1]
    coords = seen_coords(cache, "resid_post")
    coords["approximate"] = (("layer",), np.arange(layers) < layers - 1) if not tuned else (("layer",), np.ones(layers, bool))
    top = np.where(np.isnan(out["top"]), -1, out["top"]).astype(np.int64)
    units = {"entropy": "nats", "kl": "nats", "logprob": "nats"}
    dims = ("step", "layer", "batch", "pos")
    if model.tokenizer is not None:
        known = {int(i): model.to_str_tokens([int(i)])[0] for i in np.unique(top) if i >= 0}
        coords["top_token"] = (dims, np.array([known.get(int(i), "") for i in top.reshape(-1)]).reshape(top.shape))
    arrays = {n: labelled(top if n == "top" else a, dims, coords, units=units.get(n, ""), plotter="plot_lens_grid") for n, a in out.items()}
    return LabelledSet(arrays, title="tuned lens" if tuned else "logit lens", plotter="plot_lens")
