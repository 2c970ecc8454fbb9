"""The attention processor that a method installs on every self-attention (`attn1`) of a transformer."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from engine.errors import UserError
from engine.hooks.in_force import Uncopyable
from engine.hooks.state import NO_FORWARD, Forward, RunState
from freespec import tiers
from freespec.methods import Branches, Layer
from parallel.attention import KeptTokens, SequenceLayout


class BranchProcessor(Uncopyable):
    """Attention processor of one attn1: the step's branches and their fusion in place of full attention.

    Attributes:
        called: whether this forward has called it; set to False before each.
        kept: the keys outside the windows that a dual step attends to; None for all. Set before each forward.
        tiers: the layer's tiers (freespec.tiers.table_of), in a step of that mode. Set before each forward.
    """

    def __init__(self, state: RunState, layer: int) -> None:
        self.state = state
        self.layer = layer
        self.called = False
        self.kept: KeptTokens | None = None
        self.tiers: Tensor | None = None

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Self-attention of hidden states [B, s, C]; the text arguments are those of diffusers' interface and unused."""
        if encoder_hidden_states is not None or attention_mask is not None or rotary_emb is None:
            raise ValueError("this processor serves self-attention with a rotary table and without a mask only")
        state, setup, forward = self.state, self.state.setup, self.state.forward
        if forward is None or not state.running:
            raise UserError(f"layer {self.layer} {NO_FORWARD}")
        if not torch.compiler.is_compiling():  # a number per layer would compile every layer by itself
            forward.layer = self.layer
        self.called = True
        layout = forward.attention_layout
        if setup.hybrid is not None:  # only with the method direct, whose steps are all global
            whole = setup.hybrid(*setup.adapter.qkv(attn, hidden_states, rotary_emb), layout=layout)
            return setup.adapter.project_out(attn, whole)
        q, k, v = self._scatter(attn, hidden_states, rotary_emb, layout)
        if state.trace is not None:
            state.trace.observe(self.layer, forward.step, (q, k, v), forward.windows, layout)
        branches = self._branches(q, k, v, forward)
        out = branches.o_global if forward.mode == "global" else branches.o_local
        if forward.mode not in ("global", "local", "tiers"):
            layer = Layer(
                grid=forward.grid,
                sum_tokens=layout.reduce,
                sum_heads=layout.sum_heads,
                max_tokens=layout.largest if q.device.type == "cpu" else None,
                share_heads=layout.share_heads,
            )
            out = setup.method.fuse(branches, forward.weights, layer)
        assert out is not None
        if state.trace is not None:
            # The views as one, the frames, and the tiers are a local branch.
            local = out if forward.mode in ("views", "frames", "tiers") else branches.o_local
            state.trace.record(self.layer, forward.step, (local, branches.o_global), forward.weights, layout)
        return setup.adapter.project_out(attn, layout.gather(out))

    def _scatter(
        self, attn: nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor], layout: SequenceLayout
    ) -> tuple[Tensor, ...]:
        """q, k, v [B, r, n, D] of this rank. Except in a compiled block, v is sent while q and k are rotated."""
        qkv = self.state.setup.adapter.qkv
        if torch.compiler.is_compiling() or not layout.sends_early:
            return layout.scatter(*qkv(attn, hidden, rotary))
        early: list[Callable[[], Tensor]] = []
        q, k, _ = qkv(attn, hidden, rotary, on_value=lambda v: early.append(layout.start_scatter(v)))
        return *layout.scatter(q, k), early[0]()

    def _branches(self, q: Tensor, k: Tensor, v: Tensor, forward: Forward) -> Branches:
        """Compute the branches of the step's mode from q, k, v [B, r, n, D]. With views a rank has all tokens of its heads: r = S."""
        method, layout, attention = self.state.setup.method, forward.attention_layout, forward.attention
        match forward.mode:
            case "views" | "views_global":
                o_global = None
                if forward.mode == "views_global":
                    scaled = q * method.query_scale(forward.grid)
                    o_global = layout.branches(scaled, k, v, "global", attention)[1]
                views = attention.views(q, k, v, method.view_starts(forward.grid))
                return Branches(o_global=o_global, views=views)
            case "frames":
                return Branches(sets=(attention.frames(q, k, v, seen) for seen in forward.frames))
            case "tiers":
                assert self.tiers is not None and forward.rotation is not None, "set before and early in each forward"
                kernel, columns = forward.windows.keys[0], forward.grid.columns
                return Branches(
                    o_local=tiers.attend(q, k, v, self.tiers, *forward.rotation, kernel=kernel, columns=columns)
                )
            case "dual" if self.kept is not None:
                near, far = layout.thinned_branches(q, k, v, self.kept, attention)
                return Branches(o_local=near, o_global=far)
            case mode:
                local, o_global = layout.branches(q, k, v, mode, attention)
                return Branches(o_local=local, o_global=o_global)
