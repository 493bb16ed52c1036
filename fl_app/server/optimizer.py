"""Server optimizers: the step that the server makes with a round's mean update, on plain arrays.

`fl_app.flower.optimizer_strategies` offers them to others as strategies of Flower.

The mean update u takes the place of a negative gradient. With weights w, learning rate eta,
momentum beta_1, and moments m and v that begin at zero:

    fedavg      w <- w + eta u
    fedavgm     m <- beta_1 m + u                               w <- w + eta m
    fedadam     v <- beta_2 v + (1 - beta_2) u^2                w <- w + eta_t m / (sqrt(v) + tau)
    fedyogi     v <- v - (1 - beta_2) u^2 sign(v - u^2)         w <- w + eta m / (sqrt(v) + tau)
    fedadagrad  v <- v + u^2                                    w <- w + eta m / (sqrt(v) + tau)
    where the last three have m <- beta_1 m + (1 - beta_1) u, and fedadam, in step t = 1, 2, ...,
                eta_t = eta sqrt(1 - beta_2^(t+1)) / (1 - beta_1^(t+1))

fedavgm is of Hsu et al. 2019, arXiv:1909.06335 (v <- beta v + dw, w <- w - v); the last three are
Algorithm 2 of Reddi et al. 2021, arXiv:2003.00295. All are as in Flower 1.42, which departs from
the papers in this:

    fedavgm     a learning rate stands before the momentum; the paper has none (1)
    fedadam     v begins at 0, not at tau^2 or more; and eta_t: the paper corrects no bias,
                and Kingma and Ba 2014, arXiv:1412.6980, Section 2, correct it with t, not t + 1
    fedyogi     v begins at 0, not at tau^2 or more
    fedadagrad  v begins at 0, not at tau^2 or more; beta_1 is always 0, and here it is as set
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Literal, cast

import numpy as np

from shared.weights import Weights, add, blocks

OptimizerName = Literal["fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad"]


@dataclass(frozen=True)
class ServerOptimizer:
    """The name of an optimizer, and its settings; one that its formula lacks is without effect.

    Raises ValueError for a name that is not known and a setting out of range.
    """

    name: OptimizerName = "fedavg"
    learning_rate: float = 1.0  # eta
    momentum: float = 0.0  # beta_1
    beta_2: float = 0.99
    tau: float = 1e-3  # the smaller, the more adaptive

    def __post_init__(self) -> None:
        if self.name not in _RULES:
            raise ValueError(
                f"A server optimizer is one of {', '.join(_RULES)}; received {self.name!r}. Choose"
                " one."
            )
        for setting in ("learning_rate", "tau"):
            value = getattr(self, setting)
            if not 0 < value < math.inf:
                raise ValueError(
                    f"{setting} must be above 0 and finite; received {value}. Choose such a value."
                )
        for setting in ("momentum", "beta_2"):
            value = getattr(self, setting)
            if not 0 <= value < 1:
                raise ValueError(
                    f"{setting} must be at least 0 and below 1; received {value}. Choose such a"
                    " value."
                )

    @property
    def moments(self) -> tuple[str, ...]:
        """The lists of arrays of its `ServerOptimizerState` that it uses, by name."""
        if self.name == "fedavg":
            return ()
        if self.name == "fedavgm":
            return ("first_moment",)
        return ("first_moment", "second_moment")


@dataclass(frozen=True)
class ServerOptimizerState:
    """The state carried from round to round: m and v, an array for each trainable one of the model;
    empty where not used.
    """

    step: int = 0  # steps done
    first_moment: Weights = field(default_factory=list)
    second_moment: Weights = field(default_factory=list)

    def moments_of(self, index: int, names: Sequence[str]) -> list[np.ndarray]:
        """The moments of these names of the trainable array at `index`."""
        return [getattr(self, name)[index] for name in names]


def initial_state(
    optimizer: ServerOptimizer,
    weights: Sequence[np.ndarray],
    trainable: Sequence[bool],
    step: int = 0,
) -> ServerOptimizerState:
    """The state before the first step: moments of zeros.

    They are float32, or of the weights' dtype if that is wider.
    """
    moments: dict[str, Weights] = {}
    for name in optimizer.moments:
        own = _trainable_ones(trainable, weights)
        moments[name] = [np.zeros(w.shape, _wide(w.dtype)) for w in own]
    return ServerOptimizerState(step, **moments)


def apply_update(
    optimizer: ServerOptimizer,
    state: ServerOptimizerState,
    weights: Sequence[np.ndarray],
    mean_update: Iterable[np.ndarray],
    trainable: Sequence[bool],
) -> tuple[Weights, ServerOptimizerState]:
    """One step: the weights after it, by the formulas above, and the state to pass to the next one.

    Arrays that are not trainable follow plain FedAvg, w + u: they are statistics, and an adaptive
    step could make a variance negative. The mean update is taken array by array; of an iterator's,
    two at most are in memory at once. Guarantees: the arguments stay as they are and share no
    memory with the result; the weights keep their dtypes; fedavg with learning rate 1 is bit-equal
    to `add(weights, mean_update)`. Raises ValueError if shapes do not match.

    >>> optimizer = ServerOptimizer("fedavgm", momentum=0.5)
    >>> weights, trainable = [np.float32([1.0])], [True]
    >>> state = initial_state(optimizer, weights, trainable)
    >>> for _ in range(2):
    ...     weights, state = apply_update(optimizer, state, weights, [np.float32([1.0])], trainable)
    >>> weights, state.step  # 1 + 1 + (0.5 * 1 + 1)
    ([array([3.5], dtype=float32)], 2)
    """
    _check_shapes(optimizer, state, weights, trainable)
    remedy = "Average updates of this model's weights."
    updates = _checked("mean_update", mean_update, weights, remedy)
    after = initial_state(optimizer, weights, trainable, step=state.step + 1)

    stepped = []
    index = 0  # among the trainable arrays, as the moments are listed
    for is_trainable, w, u in zip(trainable, weights, updates, strict=True):
        if not is_trainable:
            stepped += add([w], [u])
            continue
        moments = state.moments_of(index, optimizer.moments)
        moments_after = after.moments_of(index, optimizer.moments)
        stepped.append(_step(optimizer, after.step, w, u, moments, moments_after))
        index += 1
    return stepped, after


def _step(
    optimizer: ServerOptimizer,
    t: int,
    w: np.ndarray,
    u: np.ndarray,
    moments: Sequence[np.ndarray],
    moments_after: Sequence[np.ndarray],
) -> np.ndarray:
    """The array w after step t, block by block; writes its moments after it to `moments_after`."""
    rule = _RULES[optimizer.name]
    stepped = np.empty(w.shape, w.dtype)
    for block in blocks(w.size):
        u_block = u.reshape(-1)[block].astype(_wide(u.dtype), copy=False)
        m_blocks = [m.reshape(-1)[block] for m in moments]

        change, *m_blocks = rule(optimizer, t, u_block, *m_blocks)

        stepped.reshape(-1)[block] = w.reshape(-1)[block] + change
        for m_after, m_block in zip(moments_after, m_blocks, strict=True):
            m_after.reshape(-1)[block] = m_block
    return stepped


# --- the rules: from t, u and the moments before to the change of w and the moments after

Rule = Callable[..., tuple[np.ndarray, ...]]


def _fedavg(settings: ServerOptimizer, t: int, u: np.ndarray) -> tuple[np.ndarray, ...]:
    return (settings.learning_rate * u,)


def _fedavgm(
    settings: ServerOptimizer, t: int, u: np.ndarray, m: np.ndarray
) -> tuple[np.ndarray, ...]:
    m = settings.momentum * m + u
    return settings.learning_rate * m, m


def _fedadam(
    settings: ServerOptimizer, t: int, u: np.ndarray, m: np.ndarray, v: np.ndarray
) -> tuple[np.ndarray, ...]:
    beta_1, beta_2 = settings.momentum, settings.beta_2
    v = beta_2 * v + (1 - beta_2) * u**2
    eta_t = settings.learning_rate * math.sqrt(1 - beta_2 ** (t + 1)) / (1 - beta_1 ** (t + 1))
    return _adaptive(settings, eta_t, u, m, v)


def _fedyogi(
    settings: ServerOptimizer, t: int, u: np.ndarray, m: np.ndarray, v: np.ndarray
) -> tuple[np.ndarray, ...]:
    v = v - (1 - settings.beta_2) * u**2 * np.sign(v - u**2)
    return _adaptive(settings, settings.learning_rate, u, m, v)


def _fedadagrad(
    settings: ServerOptimizer, t: int, u: np.ndarray, m: np.ndarray, v: np.ndarray
) -> tuple[np.ndarray, ...]:
    v = v + u**2
    return _adaptive(settings, settings.learning_rate, u, m, v)


def _adaptive(
    settings: ServerOptimizer, eta: float, u: np.ndarray, m: np.ndarray, v: np.ndarray
) -> tuple[np.ndarray, ...]:
    """The change eta m / (sqrt(v) + tau) with the new m, for a v that is new already."""
    m = settings.momentum * m + (1 - settings.momentum) * u
    return eta * m / (np.sqrt(v) + settings.tau), m, v


_RULES: Mapping[str, Rule] = {
    "fedavg": _fedavg,
    "fedavgm": _fedavgm,
    "fedadam": _fedadam,
    "fedyogi": _fedyogi,
    "fedadagrad": _fedadagrad,
}


# --- helpers


def _trainable_ones(trainable: Sequence[bool], arrays: Sequence[np.ndarray]) -> Weights:
    return [array for own, array in zip(trainable, arrays, strict=True) if own]


def _wide(dtype: np.dtype) -> np.dtype:
    """float32 at least: the square of a small update is 0 in float16."""
    return np.result_type(dtype, np.float32)


def _check_shapes(
    optimizer: ServerOptimizer,
    state: ServerOptimizerState,
    weights: Sequence[np.ndarray],
    trainable: Sequence[bool],
) -> None:
    """Raises ValueError unless the flags and the state's moments fit the weights."""
    if len(trainable) != len(weights):
        raise ValueError(
            f"trainable must say of each array whether it is; received {len(trainable)} values for"
            f" {len(weights)} arrays. Pass [variable.trainable for variable in model.weights]."
        )
    remedy = "Begin with initial_state, or restore what it became."
    own = _trainable_ones(trainable, weights)
    for name in ("first_moment", "second_moment"):
        like = own if name in optimizer.moments else []
        for _ in _checked(name, getattr(state, name), like, remedy):
            pass


def _checked(
    name: str, arrays: Iterable[np.ndarray], like: Sequence[np.ndarray], remedy: str
) -> Iterator[np.ndarray]:
    """The arrays, one by one, as long as they have the shapes of `like`; else a ValueError."""
    for i, (array, expected) in enumerate(zip_longest(arrays, like)):
        received_shape = "none" if array is None else array.shape
        expected_shape = "none" if expected is None else expected.shape
        if received_shape != expected_shape:
            raise ValueError(
                f"Array {i} of {name} must have shape {expected_shape}; received {received_shape}."
                f" {remedy}"
            )
        yield cast(np.ndarray, array)
