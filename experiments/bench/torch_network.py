"""The network again, in PyTorch: an oracle for the JAX one, and its opponent in a benchmark.

It is written from the specification and shares no code with `stf_jax`. Between layers a clip is
`(b t) c h w`, frames folded into the batch: with channels last in memory (the default) that is the
order `b t h w c` of the inputs, and every change between frames, clips and places is a view.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_EPSILON = 1e-5  # of every normalisation

# Channels of a VGG-16 block in multiples of the first block's, and its number of convolutions.
_VGG = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))


def _one_of(key: str, value: Any, allowed: tuple[str, ...]) -> Any:
    if value not in allowed:
        raise ValueError(f"{key}: got {value!r}, allowed: {', '.join(map(repr, allowed))}")
    return value


def _unfold(x: Tensor, frames: int) -> Tensor:
    """From `(b t) c h w` to `b c t h w`."""
    return x.unflatten(0, (-1, frames)).transpose(1, 2)


def _fold(x: Tensor) -> Tensor:
    """From `b c t h w` to `(b t) c h w`."""
    return x.transpose(1, 2).flatten(0, 1)


class ConvLayer(nn.Module):
    """Convolution, then optional group normalisation, then optional ReLU; zero padding keeps sizes.

    Args:
      inputs: channels that come in.
      features: channels that go out.
      kernel: (h, w) in space, (t,) in time, or (t, h, w) in both; odd sizes.
      norm_groups: most groups of the normalisation, which takes the largest divisor of `features`
        up to it; 0 is no normalisation. Statistics are those of the whole clip.
      relu: whether to clip below zero.
      stride: step in h and w.
      memory_format: how a 4-D tensor lies in memory: `torch.channels_last`, or
        `torch.contiguous_format` for channels first.
    """

    def __init__(
        self,
        inputs: int,
        features: int,
        kernel: tuple[int, ...],
        *,
        norm_groups: int,
        memory_format: Any,
        relu: bool = True,
        stride: int = 1,
    ) -> None:
        super().__init__()
        self.kernel, self.relu, self.stride = kernel, relu, stride
        if len(kernel) == 3:
            # With a stride the padding depends on the side, see `forward`.
            padding = (kernel[0] // 2, 0, 0) if stride > 1 else tuple(size // 2 for size in kernel)
            self.op = nn.Conv3d(
                inputs, features, kernel, stride=(1, stride, stride), padding=padding
            )
        else:
            # A kernel in time is a 2-D one on (t, places), the case that libraries do best.
            size = kernel if len(kernel) == 2 else (kernel[0], 1)
            padding = tuple(length // 2 for length in size)
            self.op = nn.Conv2d(inputs, features, size, padding=padding)
        self.channels_last = memory_format == torch.channels_last
        if self.channels_last:
            in_3d = len(kernel) == 3
            self.op.to(memory_format=torch.channels_last_3d if in_3d else torch.channels_last)
        self.norm = None
        if norm_groups:
            groups = max(n for n in range(1, norm_groups + 1) if features % n == 0)
            self.norm = nn.GroupNorm(groups, features, eps=_EPSILON)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """Maps `(b t) i h w` of clips of so many frames to `(b t) o hh ww`."""
        if len(self.kernel) == 2:
            y = self.op(x)
            if self.norm is None:
                return self._finished(y)
            return _fold(self._finished(_unfold(y, frames)))  # statistics of whole clips
        if len(self.kernel) == 1:
            y = self._finished(self.op(_unfold(x, frames).flatten(3)))
            return _fold(y.unflatten(3, x.shape[2:]))
        if self.stride > 1:
            # As SAME does it: what is odd about the padding goes below and to the right. A
            # symmetric one would sample the other cells of every 2x2.
            missing = [max(size - self.stride, 0) for size in self.kernel[:0:-1]]
            x = F.pad(x, [side for m in missing for side in (m // 2, m - m // 2)])
        return _fold(self._finished(self.op(_unfold(x, frames))))

    def _finished(self, y: Tensor) -> Tensor:
        if self.norm is not None:
            y = self.norm(y)
            if self.channels_last:  # which not every backend's group normalisation keeps
                y = y.contiguous(
                    memory_format=torch.channels_last if y.ndim == 4 else torch.channels_last_3d
                )
        # In place is safe: neither layer needs its output to find its gradient.
        return F.relu_(y) if self.relu else y


class Vgg(nn.ModuleDict):
    """The convolutions of VGG-16 up to `last`, on each frame by itself (SPEC 3.4, 3.5, 4.1).

    Args:
      inputs: channels of the frames.
      width: channels of the first block.
      last: name of the last convolution, such as 'block5_conv3'.
      **layer: further arguments of every `ConvLayer`.
    """

    def __init__(self, inputs: int, width: int, last: str, **layer: Any) -> None:
        super().__init__()
        for block, (multiple, count) in enumerate(_VGG, start=1):
            for number in range(1, count + 1):
                name = f"block{block}_conv{number}"
                self[name] = ConvLayer(inputs, width * multiple, (3, 3), **layer)
                inputs = width * multiple
                if name == last:
                    return

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """Maps `(b t) i h w` to `(b t) o hh ww`; a 2x2 max-pool stands between blocks."""
        for name, layer in self.items():
            if name.endswith("_conv1") and name != "block1_conv1":
                x = F.max_pool2d(x, 2)
            x = layer(x, frames)
        return x


class Conv3D(nn.Module):
    """A 3-D convolution, factorised into space and time or not (SPEC 4.4 to 4.7).

    Args:
      inputs: channels that come in.
      features: channels that go out.
      spatial: height and width of the kernel.
      temporal: its length in frames.
      settings: the configuration's `conv3d`.
      **layer: further arguments of every `ConvLayer`.
    """

    def __init__(
        self,
        inputs: int,
        features: int,
        spatial: int,
        temporal: int,
        settings: Mapping[str, Any],
        **layer: Any,
    ) -> None:
        super().__init__()
        kernels: dict[str, tuple[int, ...]] = {
            "spatial": (spatial, spatial),
            "temporal": (temporal,),
        }
        order = _one_of("conv3d.order", settings["order"], ("spatial_first", "temporal_first"))
        first, second = ("spatial", "temporal")[:: 1 if order == "spatial_first" else -1]
        if not settings["factorised"]:
            self.full = ConvLayer(inputs, features, (temporal, spatial, spatial), **layer)
            self.order: tuple[str, ...] = ("full",)
            return
        mid = features
        if _one_of("conv3d.mid", settings["mid"], ("out", "matched")) == "matched":
            # Weights: full = mid (first inputs + second features), rounded down.
            full = spatial**2 * temporal * inputs * features
            each = math.prod(kernels[first]) * inputs + math.prod(kernels[second]) * features
            mid = max(1, full // each)
        self.order = (first, second)
        self.add_module(
            first, ConvLayer(inputs, mid, kernels[first], relu=settings["mid_relu"], **layer)
        )
        self.add_module(second, ConvLayer(mid, features, kernels[second], **layer))

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """Maps `(b t) i h w` to `(b t) o h w`."""
        for name in self.order:
            x = getattr(self, name)(x, frames)
        return x


class Mst(nn.ModuleDict):
    """Parallel 3-D convolutions of several sizes, concatenated (SPEC 4.8 to 4.10).

    Args:
      inputs: channels that come in.
      settings: the configuration's `mst`.
      conv3d: the configuration's `conv3d`.
      **layer: further arguments of every `ConvLayer`.
    """

    def __init__(
        self, inputs: int, settings: Mapping[str, Any], conv3d: Mapping[str, Any], **layer: Any
    ) -> None:
        super().__init__()
        sizes = zip(settings["spatial"], settings["temporal"], strict=True)
        for number, (spatial, temporal) in enumerate(sizes, start=1):
            self[f"branch{number}"] = Conv3D(
                inputs, settings["width"], spatial, temporal, conv3d, **layer
            )

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """Maps `(b t) i h w` to `(b t) o h w`, branch 1, 2, ... along the channels."""
        return torch.cat([branch(x, frames) for branch in self.values()], dim=1)


class Temporal(Vgg):
    """Nine convolutions of VGG-16 on flow, then MST, 3DCNN, MST, 3DCNN over time (SPEC 4).

    Args:
      flow_channels: channels of the flow of a frame.
      config: the `model` part of a configuration.
      **layer: further arguments of every `ConvLayer`.
    """

    def __init__(self, flow_channels: int, config: Mapping[str, Any], **layer: Any) -> None:
        super().__init__(flow_channels, config["width"], "block4_conv2", **layer)
        mst, conv3d = config["mst"], config["conv3d"]
        multiscale, width = mst["width"] * len(mst["spatial"]), conv3d["width"]
        self["mst1"] = Mst(8 * config["width"], mst, conv3d, **layer)
        self["conv3d1"] = Conv3D(multiscale, width, 3, conv3d["temporal"], conv3d, **layer)
        self["mst2"] = Mst(width, mst, conv3d, **layer)
        self["conv3d2"] = Conv3D(multiscale, width, 3, conv3d["temporal"], conv3d, **layer)
        pooled = {"before_mst1": "mst1", "after_mst1": "conv3d1", "after_3d1": "mst2"}
        self.pooled = pooled[_one_of("temporal.pool4", config["temporal"]["pool4"], tuple(pooled))]

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """Maps `(b t) c h w` to `(b t) o hh ww`, h and w divided by 16."""
        for name, layer in self.items():
            if name in ("block2_conv1", "block3_conv1", "block4_conv1", self.pooled):
                x = F.max_pool2d(x, 2)
            x = layer(x, frames)
        return x


class Fusion(nn.Module):
    """Convolves the streams' concatenated maps in space and time, and halves h and w (SPEC 5).

    Args:
      inputs: channels of all maps together.
      settings: the configuration's `fusion`.
      **layer: further arguments of the `ConvLayer`.
    """

    def __init__(self, inputs: int, settings: Mapping[str, Any], **layer: Any) -> None:
        super().__init__()
        pools = ("after", "before", "stride", "average")
        self.pool5 = _one_of("fusion.pool5", settings["pool5"], pools)
        height, width, length = settings["kernel"]
        self.conv = ConvLayer(
            inputs,
            settings["width"],
            (length, height, width),
            relu=settings["relu"],
            stride=2 if self.pool5 == "stride" else 1,
            **layer,
        )

    def forward(self, maps: list[Tensor], frames: int) -> Tensor:
        """Maps several `(b t) c h w`, the spatial stream's first, to `(b t) d hh ww`."""
        if self.pool5 == "before":
            maps = [F.max_pool2d(x, 2) for x in maps]
        x = torch.cat(maps, dim=1) if len(maps) > 1 else maps[0]
        if self.pool5 == "stride":
            # An odd last row or column is dropped, as the poolings do.
            x = x[:, :, : x.shape[2] // 2 * 2, : x.shape[3] // 2 * 2]
        x = self.conv(x, frames)
        if self.pool5 == "after":
            return F.max_pool2d(x, 2)
        return F.avg_pool2d(x, 2) if self.pool5 == "average" else x


class Pyramid(nn.Module):
    """Windows of frames, each summarised in 1 + 2 + 4 parts: a vector per window (SPEC 6).

    Args:
      settings: the configuration's `tpn`.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.window, self.stride = settings["window"], settings["stride"]
        self.levels = tuple(settings["levels"])
        self.psi = _one_of("tpn.psi", settings["psi"], ("mean", "max"))

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """Maps `(b t) c h w` to `b s (n h w c)`, n = sum(levels), coarse levels first."""
        if frames < self.window or (frames - self.window) % self.stride:
            raise ValueError(
                f"{frames} frames do not divide into windows of {self.window} every {self.stride}"
            )
        x = x.permute(0, 2, 3, 1).reshape(-1, frames, x[0].numel())
        windows = x.unfold(1, self.window, self.stride).transpose(2, 3)  # b s window (h w c)
        levels = []
        for bins in self.levels:
            parts = windows.unflatten(2, (bins, -1))
            levels.append(parts.mean(3) if self.psi == "mean" else parts.amax(3))
        return torch.cat(levels, dim=2).flatten(2)


class Normalisation(nn.Module):
    """y = weight * (x - mean) / sqrt(variance + 1e-5) + bias (SPEC 7.3, 7.4).

    Args:
      features: length of the last axis.
      axis: statistics over the 'units' of one sample, or of each unit over the 'batch'.
    """

    def __init__(self, features: int, axis: str) -> None:
        super().__init__()
        self.axis = _one_of("lstm.ln_axis", axis, ("units", "batch"))
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises `b ... d`."""
        if self.axis == "units":
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, _EPSILON)
        variance, mean = torch.var_mean(x, 0, correction=0, keepdim=True)
        return torch.addcmul(self.bias, (x - mean) * torch.rsqrt(variance + _EPSILON), self.weight)


class LstmCell(nn.Module):
    """One step of the LSTM after the projection of its input (SPEC 7.5).

    Args:
      settings: the configuration's `lstm`.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        hidden = settings["hidden"]
        self.ln = _one_of("lstm.ln", settings["ln"], ("tf", "ifo", "ifgo", "ba2016", "none"))
        self.forget_bias = settings["forget_bias"]
        self.recurrent = nn.Linear(hidden, 4 * hidden, bias=False)
        normed = {"tf": "ifogc", "ifgo": "ifog", "ifo": "ifo", "ba2016": "xhc", "none": ""}[self.ln]
        for name in normed:
            features = 4 * hidden if name in "xh" else hidden
            self.add_module(f"ln_{name}", Normalisation(features, settings["ln_axis"]))
        # A gate that no normalisation shifts has a bias of its own.
        self.normed_gates = {name for name in "ifog" if name in normed}
        self.biased_gates = set("ifog") - self.normed_gates if self.ln != "ba2016" else set()
        for name in sorted(self.biased_gates):
            self.register_parameter(f"bias_{name}", nn.Parameter(torch.zeros(hidden)))

    def forward(self, projected: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Takes W_x x (`b 4d`, gates in the order i, f, o, g) and the state; returns h and c."""
        recurrent = self.recurrent(h)
        if self.ln == "ba2016":
            recurrent = self.ln_h(recurrent)
        gates = (projected + recurrent).chunk(4, dim=-1)
        i, f, o, g = (self._shifted(*named) for named in zip("ifog", gates, strict=True))
        c = torch.sigmoid(f + self.forget_bias) * c + torch.sigmoid(i) * torch.tanh(g)
        if self.ln == "tf":
            c = self.ln_c(c)
        shown = self.ln_c(c) if self.ln == "ba2016" else c
        return torch.sigmoid(o) * torch.tanh(shown), c

    def _shifted(self, name: str, gate: Tensor) -> Tensor:
        if name in self.normed_gates:
            return getattr(self, f"ln_{name}")(gate)
        return gate + getattr(self, f"bias_{name}") if name in self.biased_gates else gate


class Lstm(nn.Module):
    """An LSTM over the steps of a sequence, from zero states.

    Args:
      inputs: length of a step's vector.
      settings: the configuration's `lstm`.
      reverse: from the last step to the first; states stay at their steps.
    """

    def __init__(self, inputs: int, settings: Mapping[str, Any], *, reverse: bool) -> None:
        super().__init__()
        self.hidden, self.reverse = settings["hidden"], reverse
        self.input = nn.Linear(inputs, 4 * self.hidden, bias=False)
        self.cell = LstmCell(settings)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `b s d` to the states `b s hidden`."""
        projected = self.input(x)
        if self.cell.ln == "ba2016":
            projected = self.cell.ln_x(projected)  # statistics of every step by itself
        h = c = projected.new_zeros(len(x), self.hidden)
        states = []
        steps = projected.unbind(1)
        for step in reversed(steps) if self.reverse else steps:
            h, c = self.cell(step, h, c)
            states.append(h)
        return torch.stack(states[::-1] if self.reverse else states, dim=1)


class Recurrent(nn.Module):
    """One LSTM over the steps forwards and, if wanted, another one backwards (SPEC 7.6).

    Args:
      inputs: length of a step's vector.
      settings: the configuration's `lstm`.
    """

    def __init__(self, inputs: int, settings: Mapping[str, Any]) -> None:
        super().__init__()
        _one_of("lstm.cell", settings["cell"], ("lstm",))  # there is no twin of the other
        self.forwards = Lstm(inputs, settings, reverse=False)
        self.backwards = Lstm(inputs, settings, reverse=True) if settings["bidirectional"] else None

    def forward(self, x: Tensor) -> Tensor:
        """Maps `b s d` to the states `b s n hidden` of n directions, forwards first."""
        directions = [self.forwards] if self.backwards is None else [self.forwards, self.backwards]
        return torch.stack([direction(x) for direction in directions], dim=2)


class Head(nn.Module):
    """From the states of all steps and directions to logits (SPEC 7.7, 7.8).

    Args:
      num_classes: classes.
      lstm: the configuration's `lstm`.
      settings: the configuration's `head`.
    """

    def __init__(
        self, num_classes: int, lstm: Mapping[str, Any], settings: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.combine = _one_of("head.combine", settings["combine"], ("project", "sum", "mean"))
        pools = ("mean_logits", "mean_probs", "last", "per_step_loss")
        self.pool = _one_of("head.pool", settings["pool"], pools)
        self.project = None
        if self.combine == "project":
            directions = 2 if lstm["bidirectional"] else 1
            self.project = nn.Linear(directions * lstm["hidden"], num_classes)
        elif lstm["hidden"] != num_classes:
            raise ValueError(
                f"head.combine: {self.combine!r} needs as many units ({lstm['hidden']}) as classes "
                f"({num_classes})"
            )

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Maps `b s n d` to the clip's logits `b k` and every step's `b s k`."""
        steps = self._combined(states)
        if self.pool == "mean_probs":
            log_probs = steps.log_softmax(-1)
            return log_probs.logsumexp(1) - math.log(steps.shape[1]), steps
        if self.pool == "last":
            # The forward direction ends at the last step, the backward one at the first.
            ends = torch.cat([states[:, -1, :1], states[:, 0, 1:]], dim=1)
            return self._combined(ends), steps
        return steps.mean(1), steps

    def _combined(self, states: Tensor) -> Tensor:
        if self.project is not None:
            return self.project(states.flatten(-2))
        return states.sum(-2) if self.combine == "sum" else states.mean(-2)


class TorchNetwork(nn.Module):
    """Two streams, convolutional fusion, temporal pyramid, Bi-LN-LSTM, classifier.

    Weights start as PyTorch's layers do (the configuration's `init` words are not read); see
    `load_flax`.

    Args:
      config: the `model` part of a configuration, complete.
      num_classes: classes.
      flow_channels: channels of the flow of a frame.
      frame_size: height and width of the frames, on which the LSTM's input matrices depend.
      memory_format: `torch.channels_last`, or `torch.contiguous_format` for channels first.

    Raises:
      ValueError: an unknown word in the configuration (names it).

    Source: Ou and Sun (2021), sections 3.1 to 3.4; SPEC sections 3 to 7.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        num_classes: int,
        flow_channels: int,
        *,
        frame_size: tuple[int, int] = (224, 224),
        memory_format: Any = torch.channels_last,
    ) -> None:
        super().__init__()
        self.frame_size, self.memory_format = tuple(frame_size), memory_format
        streams = _one_of("streams", config["streams"], ("both", "rgb", "flow"))
        norm = _one_of("norm", config["norm"], ("none", "group"))
        layer = {
            "norm_groups": config["norm_groups"] if norm == "group" else 0,
            "memory_format": memory_format,
        }
        width, maps = config["width"], 0
        self.spatial = self.temporal = None
        if streams != "flow":
            self.spatial = Vgg(3, width, "block5_conv3", **layer)
            maps += 8 * width
        if streams != "rgb":
            self.temporal = Temporal(flow_channels, config, **layer)
            maps += config["conv3d"]["width"]
        self.fusion = Fusion(maps, config["fusion"], **layer)
        self.pyramid = Pyramid(config["tpn"])
        drop = config["drop"]
        keep = _one_of("drop.semantics", drop["semantics"], ("drop", "keep")) == "keep"
        self.drop_input = nn.Dropout(1 - drop["input"] if keep else drop["input"])
        self.drop_output = nn.Dropout(1 - drop["output"] if keep else drop["output"])
        # Five halvings, each rounded down.
        places = (self.frame_size[0] // 32) * (self.frame_size[1] // 32)
        length = sum(config["tpn"]["levels"]) * places * config["fusion"]["width"]
        self.recurrent = Recurrent(length, config["lstm"])
        self.head = Head(num_classes, config["lstm"], config["head"])

    def forward(self, rgb: Tensor, flow: Tensor) -> Tensor:
        """Classifies clips.

        Args:
          rgb: float32 `b t h w 3`, normalised colour.
          flow: float32 `b t h w c`, normalised flow.

        Returns:
          Logits `b k`.
        """
        return self.all_logits(rgb, flow)[0]

    def all_logits(self, rgb: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, but returns every step's logits `b s k` too (for head.pool per_step_loss).

        Raises:
          ValueError: frames of another size than the network was made for.
        """
        if rgb.shape[:4] != flow.shape[:4] or tuple(rgb.shape[2:4]) != self.frame_size:
            raise ValueError(
                f"the network is made for frames of {self.frame_size} px; got rgb "
                f"{tuple(rgb.shape)} and flow {tuple(flow.shape)}"
            )
        frames = rgb.shape[1]
        maps = [
            stream(self._channels_first(clip), frames)
            for stream, clip in ((self.spatial, rgb), (self.temporal, flow))
            if stream is not None
        ]
        vectors = self.pyramid(self.fusion(maps, frames), frames)
        states = self.recurrent(self.drop_input(vectors))
        return self.head(self.drop_output(states))

    def _channels_first(self, clip: Tensor) -> Tensor:
        x = clip.flatten(0, 1).permute(0, 3, 1, 2)
        return x.contiguous(memory_format=self.memory_format)


def _kernel_to_flax(x: Tensor) -> Tensor:
    """Puts inputs and outputs last: `o i ...` to `... i o`."""
    return x.permute(*range(2, x.ndim), 1, 0)


def _time_kernel_to_flax(x: Tensor) -> Tensor:
    """As `_kernel_to_flax` for a kernel in time: `o i t 1` to `t i o`."""
    return _kernel_to_flax(x.squeeze(-1))


def _as_is(x: Tensor) -> Tensor:
    return x


def _weight_map(
    network: TorchNetwork,
) -> Iterator[tuple[str, nn.Parameter, Callable[[Tensor], Tensor]]]:
    """Yields every parameter once: its flax name, itself, and what views it in flax's layout."""
    modules = dict(network.named_modules())
    for name, parameter in network.named_parameters():
        *owners, leaf = name.split(".")
        owner, parent = modules[".".join(owners)], modules[".".join(owners[:-1])]
        layout = _as_is
        if leaf == "weight" and isinstance(owner, nn.Conv2d | nn.Conv3d | nn.Linear):
            in_time = isinstance(parent, ConvLayer) and len(parent.kernel) == 1
            leaf, layout = "kernel", _time_kernel_to_flax if in_time else _kernel_to_flax
        elif leaf == "weight":
            leaf = "scale"
        # A torch module cannot have a submodule called forward.
        flax = {"forwards": "forward", "backwards": "backward"}
        path = [flax.get(part, part) for part in owners if part != "op"]
        yield "/".join([*path, leaf]), parameter, layout


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, node in tree.items():
        if isinstance(node, Mapping):
            yield from _leaves(node, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", node


@torch.no_grad()
def load_flax(network: TorchNetwork, params: Mapping[str, Any]) -> None:
    """Copies the parameters of the JAX network in; all of them, or none when something is amiss.

    Args:
      network: made from the same configuration.
      params: the tree of arrays below flax's 'params'.

    Raises:
      ValueError: a tensor is missing, too many or of another shape (names all such tensors).
    """
    given = {name: np.asarray(leaf) for name, leaf in _leaves(params)}
    targets = {name: layout(parameter) for name, parameter, layout in _weight_map(network)}
    faults = [f"missing: {name}" for name in targets if name not in given]
    for name, array in given.items():
        if name not in targets:
            faults.append(f"unexpected: {name}")
        elif array.shape != tuple(targets[name].shape):
            faults.append(f"{name} is {array.shape}, expected {tuple(targets[name].shape)}")
    if faults:
        raise ValueError("these are not the network's parameters:\n  " + "\n  ".join(faults))
    for name, target in targets.items():
        # Copied: torch warns of arrays that cannot be written to, as JAX's are.
        target.copy_(torch.from_numpy(np.array(given[name])))


def flax_gradients(network: TorchNetwork) -> dict[str, Any]:
    """Returns the gradients as a tree of arrays, named and laid out as the JAX network's.

    Raises:
      ValueError: a parameter has no gradient (names it).
    """
    tree: dict[str, Any] = {}
    for name, parameter, layout in _weight_map(network):
        if parameter.grad is None:
            raise ValueError(f"{name} has no gradient: run a backward pass first")
        *path, leaf = name.split("/")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = layout(parameter.grad).cpu().contiguous().numpy()
    return tree
