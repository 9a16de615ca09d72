"""PyTorch CPU peer of the language model of tests/data/byte_lm and its scaled sizes, and of its training.

A layer: y = in_proj(rms(x)) = q | k | v | u | z (no k, v where a layer uses those of another); out_proj((rms(attention) + rms(mamba)) / 2);
then a gated MLP. Grouped attention with rope and values twice as wide as keys, over meta tokens and a window; Mamba-1 with norms of its
time step, B and C; embedding and head are one matrix. Tensors have the names of the checkpoint.

usage: torch_hymba_lm.py [--threads N] [--form FORM] step DIR TEXT ROWS LENGTH STEPS     times steps, one JSON line (as examples/lm_step.rs)
       torch_hymba_lm.py ... fit DIR TEXT LENGTH [--epochs E] [--rate X]                 trains; bits per byte of the last twentieth
       torch_hymba_lm.py perplexity DIR TEXT                                             of the first 20 windows of 96 bytes

A form is some of these words: `compile` (torch.compile of all but the scan, whose pieces are compiled anyway), `taps` (the convolution as
four multiply-adds), `halves` (values in two halves, each as wide as the keys) or `pad` (keys as wide as the values), `en` (channels before
states), `plain` (nothing is compiled).
"""
import argparse
import json
import math
import os
import statistics as st
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

from torch_hymba import _unrolled as scan_piece_en  # the same with states [B,E,N] and A [E,N]

CHUNK = int(os.environ.get("CHUNK", "16"))


def scan_piece(h, u, dt, A, Bm, C):
    """h [B,N,E], u and dt [B,T,E], A [N,E], Bm and C [B,T,N] -> the state after T frames, y [B,T,E]"""
    ys = []
    for t in range(u.shape[1]):
        d = dt[:, t].unsqueeze(1)
        h = torch.exp(d * A) * h + (d * u[:, t].unsqueeze(1)) * Bm[:, t].unsqueeze(2)
        ys.append((h * C[:, t].unsqueeze(2)).sum(1))
    return h, torch.stack(ys, 1)


COMPILED = {f: torch.compile(f, dynamic=False) for f in (scan_piece, scan_piece_en)}


def scan(u, dt, A, Bm, C, form):
    """In compiled pieces; the last is padded with dt = 0, which changes nothing."""
    B, T, E = u.shape
    pad = -T % CHUNK
    u, dt, Bm, C = (F.pad(x, (0, 0, 0, pad)) for x in (u, dt, Bm, C))
    piece = scan_piece_en if "en" in form else scan_piece
    if "en" in form:
        h = u.new_zeros(B, E, A.shape[1])
    else:
        h, A = u.new_zeros(B, A.shape[1], E), A.t().contiguous()
    piece, ys = piece if "plain" in form else COMPILED[piece], []
    for i in range(0, T + pad, CHUNK):
        j = i + CHUNK
        h, y = piece(h, u[:, i:j], dt[:, i:j], A, Bm[:, i:j], C[:, i:j])
        ys.append(y)
    return torch.cat(ys, 1)[:, :T]


class Rms(nn.Module):
    def __init__(s, n, eps):
        super().__init__()
        s.weight, s.eps = nn.Parameter(torch.ones(n)), eps

    def forward(s, x):
        return F.rms_norm(x, s.weight.shape, s.weight, s.eps)


class Layer(nn.Module):
    def __init__(s, c, i):
        super().__init__()
        H, s.nq, s.nkv, eps = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"], c["rms_norm_eps"]
        s.E, s.N, s.R, K, Fw = int(c["mamba_expand"] * H), c["mamba_d_state"], c["mamba_dt_rank"], c["mamba_d_conv"], c["intermediate_size"]
        s.dk, s.dv, s.K = H // s.nq, s.E // s.nq, K
        groups = [g for g in c["kv_reuse_group"] or [] if i in g]
        s.source = groups[0][0] if groups else i
        s.own = s.source == i
        s.window = None if i in c["global_attn_idx"] else c["sliding_window"]
        s.split = [H, s.nkv * s.dk, s.nkv * s.dv, s.E, s.E] if s.own else [H, s.E, s.E]
        s.input_layernorm, s.pre_moe_layernorm = Rms(H, eps), Rms(H, eps)
        m = s.mamba = nn.Module()
        m.in_proj, m.out_proj = nn.Linear(H, sum(s.split), bias=False), nn.Linear(s.E, H, bias=False)
        m.conv1d = nn.Conv1d(s.E, s.E, K, groups=s.E, padding=K - 1)
        m.x_proj = nn.ModuleList([nn.Linear(s.E, s.R + 2 * s.N, bias=False)])
        m.dt_proj = nn.ModuleList([nn.Linear(s.R, s.E)])
        m.A_log, m.D = nn.ParameterList([torch.zeros(s.E, s.N)]), nn.ParameterList([torch.ones(s.E)])
        m.dt_layernorm, m.B_layernorm, m.C_layernorm = Rms(s.R, eps), Rms(s.N, eps), Rms(s.N, eps)
        m.pre_avg_layernorm1, m.pre_avg_layernorm2 = Rms(s.E, eps), Rms(s.E, eps)
        e = nn.Module()
        e.gate_proj, e.up_proj, e.down_proj = nn.Linear(H, Fw, bias=False), nn.Linear(H, Fw, bias=False), nn.Linear(Fw, H, bias=False)
        s.moe = nn.Module()
        s.moe.experts = nn.ModuleList([e])

    def attend(s, q, kv, mask, form):
        """q [B,nq,T,dk], k [B,nkv,T,dk], v [B,nkv,T,dv]"""
        k, v = (x.repeat_interleave(s.nq // s.nkv, 1) for x in kv)
        how = dict(attn_mask=mask) if mask is not None else dict(is_causal=True)
        if "halves" in form:  # the CPU's flash kernel wants values as wide as keys
            return torch.cat([F.scaled_dot_product_attention(q, k, x, **how) for x in v.split(s.dk, -1)], -1)
        if "pad" in form:
            q, k = (F.pad(x, (0, s.dv - s.dk)) for x in (q, k))
        return F.scaled_dot_product_attention(q, k, v, scale=s.dk ** -0.5, **how)

    def before(s, x, cos, sin, shared, mask, form):
        """All up to the scan -> attention, and what the scan reads."""
        B, T, _ = x.shape
        m = s.mamba
        parts = m.in_proj(s.input_layernorm(x)).split(s.split, -1)
        heads = lambda y, n: y.view(B, T, n, -1).transpose(1, 2)
        q, u, z = rope(heads(parts[0], s.nq), cos, sin), parts[-2], parts[-1]
        kv = (rope(heads(parts[1], s.nkv), cos, sin), heads(parts[2], s.nkv)) if s.own else shared
        a = s.attend(q, kv, mask, form).transpose(1, 2).reshape(B, T, s.E)
        if "taps" in form:
            w, p = m.conv1d.weight[:, 0], F.pad(u, (0, 0, s.K - 1, 0))
            u = sum((p[:, i:i + T] * w[:, i] for i in range(s.K)), m.conv1d.bias)
        else:
            u = m.conv1d(u.transpose(1, 2))[..., :T].transpose(1, 2)
        u = F.silu(u)
        dt, Bm, C = m.x_proj[0](u).split([s.R, s.N, s.N], -1)
        dt = F.softplus(m.dt_proj[0](m.dt_layernorm(dt)))
        return a, kv, u, z, dt, m.B_layernorm(Bm), m.C_layernorm(C), -torch.exp(m.A_log[0])

    def after(s, x, a, y, u, z):
        m, e = s.mamba, s.moe.experts[0]
        y = (y + m.D[0] * u) * F.silu(z)
        x = x + m.out_proj((m.pre_avg_layernorm1(a) + m.pre_avg_layernorm2(y)) / 2)
        n = s.pre_moe_layernorm(x)
        return x + e.down_proj(F.silu(e.gate_proj(n)) * e.up_proj(n))


def rope(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class HymbaLm(nn.Module):
    def __init__(s, c, form):
        super().__init__()
        fixed = dict(kq_norm="none", mlp_hidden_act="silu", rope=True, rope_type="default", tie_word_embeddings=True,
                     mamba_inner_layernorms=True, mamba_conv_bias=True, mamba_proj_bias=False)
        for key, value in fixed.items():
            if c.get(key) != value:
                raise SystemExit(f"config.json: {key} is {c.get(key)!r}; this program knows {value!r} only")
        s.c, s.form, s.M = c, form, c["num_memory_tokens"]
        m = s.model = nn.Module()
        m.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        m.memory_tokens = nn.Parameter(torch.zeros(s.M, c["hidden_size"]))
        m.layers = nn.ModuleList(Layer(c, i) for i in range(c["num_hidden_layers"]))
        m.final_layernorm = Rms(c["hidden_size"], c["rms_norm_eps"])
        # not methods: one compiled function serves all layers of the same shapes
        wrap = (lambda f: torch.compile(f, dynamic=False)) if "compile" in form else (lambda f: f)
        s.before, s.after, s.head = wrap(Layer.before), wrap(Layer.after), wrap(HymbaLm.loss)

    def frame(s, T):
        """cos and sin [T,dk/2], and the mask of windowed layers [T,T]"""
        dk = s.c["hidden_size"] // s.c["num_attention_heads"]
        p = torch.arange(T, dtype=torch.float32)
        angles = torch.outer(p, s.c["rope_theta"] ** (-torch.arange(0, dk, 2, dtype=torch.float32) / dk))
        q, k = torch.arange(T)[:, None], torch.arange(T)[None]
        mask = (k <= q) & ((k < s.M) | (q - k <= (s.c["sliding_window"] or T)))
        return angles.cos(), angles.sin(), mask

    def forward(s, ids, targets):
        """ids and targets [B,T], -100 where nothing is predicted -> the sum of the losses"""
        B, T = ids.shape
        cos, sin, mask = s.frame(s.M + T)
        x = torch.cat([s.model.memory_tokens.expand(B, -1, -1), s.model.embed_tokens(ids)], 1)
        made = {}
        for i, layer in enumerate(s.model.layers):
            windowed = mask if layer.window is not None else None
            a, made[i], u, z, dt, Bm, C, A = s.before(layer, x, cos, sin, made.get(layer.source), windowed, s.form)
            made[i] = made[i] if layer.own else None
            x = s.after(layer, x, a, scan(u, dt, A, Bm, C, s.form), u, z)
        return s.head(s, x[:, s.M:], targets)

    def loss(s, x, targets):
        logits = F.linear(s.model.final_layernorm(x), s.model.embed_tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")


def load(folder, form):
    from safetensors.torch import load_file
    net = HymbaLm(json.load(open(os.path.join(folder, "config.json"))), form)
    tensors = {k: v.float() for k, v in load_file(os.path.join(folder, "model.safetensors")).items()}
    net.load_state_dict(tensors)
    return net


def optimizer(net, rate):
    flat = lambda name, p: p.ndim < 2 or name.endswith(("memory_tokens", "A_log.0"))
    named = list(net.named_parameters())
    groups = [dict(params=[p for n, p in named if not flat(n, p)], weight_decay=0.1),
              dict(params=[p for n, p in named if flat(n, p)], weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=1e-8, fused=True)


def step(net, opt, ids, targets):
    opt.zero_grad(set_to_none=True)
    count = int((targets >= 0).sum())
    loss = net(ids, targets) / count
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0, foreach=True)
    opt.step()
    return loss.item() * count, count


def rows_of(data, length):
    """As TokenRows::packed: rows that begin with the last byte of the one before; -100 fills the last."""
    rows = torch.full((math.ceil((len(data) - 1) / (length - 1)), length), -100)
    for i, row in enumerate(rows):
        piece = data[i * (length - 1):][:length]
        row[:len(piece)] = torch.tensor(list(piece))
    return rows[:, :-1].clamp(min=0), rows[:, 1:]


def bench(a):
    data = open(a.text, "rb").read()
    rows = torch.tensor(list(data[:a.rows * a.length])).view(a.rows, a.length)
    ids, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    net = load(a.dir, a.form)
    opt, mean = optimizer(net, 1e-3), lambda loss, count: loss / count
    losses = [mean(*step(net, opt, ids, targets)) for _ in range(3)]
    ms = []
    for _ in range(a.steps):
        t = time.perf_counter()
        step(net, opt, ids, targets)
        ms.append((time.perf_counter() - t) * 1e3)
    print(json.dumps(dict(peer="torch " + torch.__version__, form=a.form, threads=a.threads, losses=losses, ms_min=min(ms),
                          ms_med=st.median(ms), ms_max=max(ms), parameters=sum(p.numel() for p in net.parameters()))))


def fit(a):
    data = open(a.text, "rb").read()
    cut = len(data) - len(data) // 20
    (ids, targets), held_out = rows_of(data[:cut], a.length), rows_of(data[cut:], a.length)
    net = load(a.dir, a.form)
    opt = optimizer(net, a.rate)
    in_epoch = math.ceil(len(ids) / 16)
    steps = in_epoch * a.epochs
    warm_up, floor, start = int(steps * 0.05), 0.1 * a.rate, time.perf_counter()
    torch.manual_seed(0)
    for n in range(steps):
        if n % in_epoch == 0:
            order = torch.randperm(len(ids))
        # shapes stay the same: rows that are missing predict nothing
        rows = order[n % in_epoch * 16:][:16]
        x, y = torch.zeros(16, a.length - 1, dtype=torch.int64), torch.full((16, a.length - 1), -100)
        x[:len(rows)], y[:len(rows)] = ids[rows], targets[rows]
        down = 0.5 + 0.5 * math.cos(math.pi * (n - warm_up) / (steps - warm_up))
        rate = a.rate * (n + 1) / (warm_up + 1) if n < warm_up else floor + (a.rate - floor) * down
        for group in opt.param_groups:
            group["lr"] = rate
        loss, count = step(net, opt, x, y)
        if n % 50 == 0:
            print(f"step {n} of {steps}: loss {loss / count:.4f}, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    with torch.no_grad():
        total = 0.0
        for x, y in zip(held_out[0].split(16), held_out[1].split(16)):
            total += net(x, y).item()
    bits = total / math.log(2) / (len(data) - cut - 1)
    print(json.dumps(dict(peer="torch " + torch.__version__, steps=steps, bits_per_byte=bits, seconds=time.perf_counter() - start)))


def perplexity(a):
    """Each window of 96 bytes is predicted from those before it and the one before the window."""
    data = open(a.text, "rb").read()
    rows = torch.tensor([list(data[i * 96:i * 96 + 97]) for i in range(20)])
    with torch.no_grad():
        print(math.exp(load(a.dir, "plain")(rows[:, :-1], rows[:, 1:]).item() / (20 * 96)))


if __name__ == "__main__":
    p = argparse.ArgumentParser()
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--form", default="compile taps halves")
    modes = p.add_subparsers(dest="mode", required=True)
    for name, run, more in (("step", bench, ("rows", "length", "steps")), ("fit", fit, ("length",)), ("perplexity", perplexity, ())):
        q = modes.add_parser(name)
        q.set_defaults(run=run)
        q.add_argument("dir")
        q.add_argument("text")
        for number in more:
            q.add_argument(number, type=int)
        if name == "fit":
            q.add_argument("--epochs", type=int, default=1)
            q.add_argument("--rate", type=float, default=2e-3)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    torch._dynamo.config.recompile_limit = 64
    a.run(a)
