"""The bidirectional LSTM with layer normalisation."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from stf_jax.vgg import check_choice, check_setting, is_count

_EPSILON = 1e-5

Carry = tuple[Float[Array, "b d"], Float[Array, "b d"]]


@dataclasses.dataclass(frozen=True)
class LSTMSettings:
    """The recurrent layer (SPEC 7.1 to 7.6).

    Args:
      cell: 'lstm', or 'mean' for none: the mean of the steps, which forgets their order, goes to
        the classifier as one step. Then the other settings are not read.
      hidden: units per direction.
      ln: what is normalised. 'tf': all four gates and the new cell state, which is kept normalised
        (the stock TensorFlow 1 cell). 'ifo': the three sigmoid gates (the paper's words). 'ifgo':
        all four gates. 'ba2016': W_x x and W_h h apart, each as one vector of all gates, and the
        cell state on its way out only. 'none'.
      ln_axis: statistics over the 'units' of one sample, or of one unit over the 'batch'. The
        latter always takes the batch at hand, in evaluation too: its results depend on the batch.
      forget_bias: added before the forget gate's sigmoid.
      bidirectional: a second LSTM runs over the steps from last to first.

    Raises:
      ValueError: an impossible value (names it).
    """

    cell: str
    hidden: int
    ln: str
    ln_axis: str
    forget_bias: float
    bidirectional: bool

    def __post_init__(self) -> None:
        """Checks the values."""
        check_choice("lstm.cell", self.cell, ("lstm", "mean"))
        check_setting(is_count(self.hidden), "lstm.hidden", self.hidden, "an integer from 1 on")
        check_choice("lstm.ln", self.ln, ("tf", "ifo", "ifgo", "ba2016", "none"))
        check_choice("lstm.ln_axis", self.ln_axis, ("units", "batch"))
        check_setting(
            isinstance(self.forget_bias, float | int), "lstm.forget_bias", self.forget_bias, "float"
        )
        check_setting(
            isinstance(self.bidirectional, bool),
            "lstm.bidirectional",
            self.bidirectional,
            "True, False",
        )


class Normalisation(nn.Module):
    """y = gain * (x - mean) / sqrt(variance + 1e-5) + bias.

    Attributes:
      over: 'units' or 'batch': what mean and variance are taken over.

    Source: SPEC 7.3, 7.4.
    """

    over: str

    @nn.compact
    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b d"]:
        """Normalises; gains start at 1, biases at 0."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        axis = -1 if self.over == "units" else 0
        centred = x - x.mean(axis, keepdims=True)
        variance = jnp.square(centred).mean(axis, keepdims=True)
        return centred * jax.lax.rsqrt(variance + _EPSILON) * scale[None] + bias[None]


class LSTMCell(nn.Module):
    """One step of the LSTM with layer normalisation, after the input projection.

        a = W_x x + W_h h;   i, f, o = sigmoid(LN(a_i)), sigmoid(LN(a_f) + forget_bias), ...
        c' = LN(f c + i g);  h' = o tanh(c')            (with ln='tf'; see `LSTMSettings`)

    A gate that no normalisation shifts has a bias of its own.

    Attributes:
      settings: units and normalisation.

    Source: paper, section 3.4; SPEC 7.5. Differs: no ('tf' is our reading).
    """

    settings: LSTMSettings

    @nn.compact
    def __call__(
        self, carry: Carry, projected: Float[Array, "b d4"]
    ) -> tuple[Carry, Float[Array, "b d"]]:
        """Takes (c, h) and W_x x, the gates in the order i, f, o, g; returns (c, h) and h."""
        settings = self.settings
        c, h = carry
        recurrent = nn.Dense(
            4 * settings.hidden,
            use_bias=False,
            kernel_init=nn.initializers.glorot_uniform(),
            name="recurrent",
        )(h)
        if settings.ln == "ba2016":
            projected = self._normalise("ln_x", projected)
            recurrent = self._normalise("ln_h", recurrent)
        gates = dict(zip("ifog", jnp.split(projected + recurrent, 4, axis=-1), strict=True))
        normalised = {"tf": "ifog", "ifgo": "ifog", "ifo": "ifo"}.get(settings.ln, "")
        for name, gate in gates.items():
            if name in normalised:
                gates[name] = self._normalise(f"ln_{name}", gate)
            elif settings.ln != "ba2016":
                bias = self.param(f"bias_{name}", nn.initializers.zeros, (settings.hidden,))
                gates[name] = gate + bias[None]
        forget = nn.sigmoid(gates["f"] + settings.forget_bias)
        c = forget * c + nn.sigmoid(gates["i"]) * jnp.tanh(gates["g"])
        if settings.ln == "tf":
            c = self._normalise("ln_c", c)
        shown = self._normalise("ln_c", c) if settings.ln == "ba2016" else c
        h = nn.sigmoid(gates["o"]) * jnp.tanh(shown)
        return (c, h), h

    def _normalise(self, name: str, x: Float[Array, "b d"]) -> Float[Array, "b d"]:
        return Normalisation(self.settings.ln_axis, name=name)(x)


class _Product(nn.Module):
    """x W, summed in the type of W whatever the factors are rounded to."""

    features: int
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s e"]:
        init = nn.initializers.glorot_uniform()
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        dtype = x.dtype if self.dtype is None else self.dtype
        factors = x.astype(dtype), kernel.astype(dtype)
        return jnp.einsum("bsd,de->bse", *factors, preferred_element_type=kernel.dtype)


class LSTM(nn.Module):
    """An LSTM over the steps of a sequence, from zero states.

    Attributes:
      settings: the cell's.
      reverse: from the last step to the first; outputs stay at their steps.
      dtype: of the factors of the input product, such as bfloat16; None is that of the input. Its
        sums, the cell and the states have the parameters' type.
    """

    settings: LSTMSettings
    reverse: bool
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s hidden"]:
        """Returns h at every step."""
        hidden = self.settings.hidden
        # One matrix product for all steps: nearly all the layer's work is here.
        projected = _Product(4 * hidden, self.dtype, name="input")(x)
        if self.reverse:
            projected = projected[:, ::-1]
        scan = nn.scan(
            LSTMCell,
            variable_broadcast="params",
            split_rngs={"params": False},
            in_axes=1,
            out_axes=1,
        )
        zeros = jnp.zeros((x.shape[0], hidden), projected.dtype)
        _, states = scan(self.settings, name="cell")((zeros, zeros), projected)
        return states[:, ::-1] if self.reverse else states


class BiLSTM(nn.Module):
    """Two LSTMs with weights of their own, one over the steps forwards and one backwards.

    Attributes:
      settings: of both; `bidirectional` says whether there is a second one. With `cell` 'mean'
        there is none, and nothing to learn: what an ablation puts in their place.
      dtype: as in `LSTM`.

    Source: paper, section 3.4; SPEC 7.6. Differs: no.
    """

    settings: LSTMSettings
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b _s n _hidden"]:
        """Returns h of every step and direction, forward first; of 'mean' `b 1 1 d`."""
        if self.settings.cell == "mean":
            return x.mean(axis=1, keepdims=True)[:, :, None]
        directions = [LSTM(self.settings, False, self.dtype, name="forward")(x)]
        if self.settings.bidirectional:
            directions.append(LSTM(self.settings, True, self.dtype, name="backward")(x))
        return jnp.stack(directions, axis=2)
