"""Training of the language model in PyTorch and in this crate, process by process in rotation; prints medians and ratios.

    python3 lm_train_bench.py [--sets 2] [--steps 3] [--sizes 1.2M,30M] [--threads 1,2] [--small]
    python3 lm_train_bench.py --held-out TEXT [--epochs 1]
    python3 lm_train_bench.py --perplexity DIR TEXT

Needs a Python with torch and safetensors (set PY to it), and, built in release, `examples/lm_step` (features lm and profile) and, for
--held-out, the program `hymba`. Nothing else may run meanwhile.

The first times a step: forward, cross-entropy, backward, clipping, AdamW, on 16 rows of 256 bytes of tests/data/byte_lm/text.txt (4 rows
of 64 with --small, which only shows that it works). Sizes: the configuration of tests/data/byte_lm, and the same wider and deeper. Both
begin with the same weights, and their losses of three steps are compared. The first set tries all forms of the PyTorch program, the others
repeat the fastest. 125M is timed of this crate alone, with its share of FMA peak.

The second trains the 1.2M model from the same first weights with the same options on the first 95 % of TEXT in both, in rows of 256
bytes whose order each draws for itself, and prints the bits per byte of the rest.

The third is that of the model in DIR, by the PyTorch program: over the first 20 windows of 96 bytes of TEXT.
"""
import argparse, json, os, re, statistics as st, subprocess, sys, tempfile

ap = argparse.ArgumentParser()
ap.add_argument("--sets", type=int, default=2)
ap.add_argument("--steps", default="3")
ap.add_argument("--sizes", default="1.2M,30M")
ap.add_argument("--threads", default="1,2")
ap.add_argument("--forms", default="compile taps halves;compile taps en halves", help="of the PyTorch program; see there")
ap.add_argument("--small", action="store_true")
ap.add_argument("--held-out", metavar="TEXT")
ap.add_argument("--epochs", default="1")
ap.add_argument("--perplexity", nargs=2, metavar=("DIR", "TEXT"))
a = ap.parse_args()

here = os.path.dirname(os.path.abspath(__file__))
root, py, release = os.path.join(here, "../.."), os.environ.get("PY", sys.executable), os.path.join(here, "../../target/release")
text, config = (os.path.join(root, "tests/data/byte_lm", name) for name in ("text.txt", "config.json"))
# width, layers, and layers that share keys and values
SIZES = {"1.2M": (128, 4, [[1, 2]]), "30M": (512, 7, [[1, 2], [3, 4]]), "125M": (768, 13, [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10]])}


def run(command, threads):
    done = subprocess.run(command, env={**os.environ, "RAYON_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return done


def torch(threads, *arguments, form=a.forms.split(";")[0]):
    return run([py, f"{here}/torch_hymba_lm.py", "--threads", threads, "--form", form, *arguments], threads).stdout


def ours(threads, *arguments):
    return json.loads(run([f"{release}/examples/lm_step", *arguments], threads).stdout)


def folder_of(size, out):
    """A folder with the configuration of the size, and first weights by this crate."""
    h, layers, shared = SIZES[size]
    folder = os.path.join(out, size)
    os.mkdir(folder)
    c = {**json.load(open(config)), "hidden_size": h, "num_hidden_layers": layers, "kv_reuse_group": shared, "global_attn_idx": [0, layers - 1],
         "num_attention_heads": h // 32, "num_key_value_heads": h // 64, "intermediate_size": 11 * h // 4, "mamba_dt_rank": h // 16,
         "torch_dtype": "float32"}
    del c["conv_dim"], c["layer_type"]  # a value for each layer
    json.dump(c, open(f"{folder}/config.json", "w"))
    ours("2", folder, text, "1", "2", "1")
    return folder


def compare_steps(out):
    rows, length = ("4", "64") if a.small else ("16", "256")
    median = lambda all: st.median(one["ms_med"] for one in all)
    for size in a.sizes.split(","):
        folder = folder_of(size, out)
        for threads in a.threads.split(","):
            mine, forms, apart = [], {} if size == "125M" else {form: [] for form in a.forms.split(";")}, 0.0
            for _ in range(a.sets):
                mine.append(ours(threads, folder, text, rows, length, a.steps))
                for form, times in forms.items():
                    times.append(json.loads(torch(threads, "step", folder, text, rows, length, a.steps, form=form)))
                    apart = max(apart, *(abs(x - y) for x, y in zip(mine[-1]["losses"], times[-1]["losses"])))
                if apart > 1e-4:
                    sys.exit(f"{size}: the losses differ by {apart}")
                best = min(forms, key=lambda form: median(forms[form]), default=None)
                forms = {best: forms[best]} if best else {}
            top, ms = max(mine, key=lambda one: one["of_peak"]), median(mine)
            line = f"{size:5s} {top['parameters'] / 1e6:6.1f} M, threads {threads}: hymba {ms:9.1f} ms, {top['tokens_per_s_per_thread']:.0f} tokens/s a thread, "
            line += f"{top['gflops_per_thread']:.1f} of {top['peak_gflops_per_thread']:.1f} GFLOP/s ({100 * top['of_peak']:.0f} %)"
            if best:
                line += f"; torch ({best}) {median(forms[best]):9.1f} ms, {median(forms[best]) / ms:.2f} x; losses apart by {apart:.1e}"
            print(line, flush=True)


def compare_held_out(out):
    folder = folder_of("1.2M", out)
    peer = json.loads(torch("2", "fit", folder, a.held_out, "256", "--epochs", a.epochs))
    done = run([f"{release}/hymba", "train-lm", a.held_out, "--out", f"{out}/trained", "--hidden", "128", "--layers", "4", "--epochs", a.epochs], "2")
    bits = float(re.findall(r"([0-9.]+) bits per byte", done.stderr)[-1])
    print(f"{peer['steps']} steps: hymba {bits:.4f} bits per byte, torch {peer['bits_per_byte']:.4f} ({peer['seconds']:.0f} s): {100 * (bits / peer['bits_per_byte'] - 1):+.2f} %")


if a.perplexity:
    print(torch("2", "perplexity", *a.perplexity).strip())
else:
    with tempfile.TemporaryDirectory() as out:
        compare_held_out(out) if a.held_out else compare_steps(out)
