"""Accuracy and time of aeon's classifiers beside `classify`, on the same splits and seeds; prints one table.

    python3 classify_bench.py [--seeds 0,1,2] [--methods dtw,rocket,mrh,hymba] [--results FILE] FOLDER... [-- COMMAND...]

Each FOLDER holds NAME_TRAIN.ts and NAME_TEST.ts. Needs a Python with aeon and torch (set PY to it; `pip install aeon torch` in a virtual
environment). COMMAND is the program of examples/classify; it is called with both files, `--seed` and `--out`.
1-NN DTW has no seed: it runs once for each set, with a window of the whole series. Every run is a process of its own with two threads, one after the other: its time is that of the whole program, from reading the files on,
compilation of numba's functions included. Nothing else may run meanwhile if times are to be compared. FILE keeps a JSON line for each run,
and runs that it has are not repeated.
"""
import argparse, json, os, re, statistics as st, subprocess, sys, tempfile, time

METHODS = {"dtw": "1-NN DTW", "rocket": "ROCKET", "mrh": "MultiRocketHydra", "hymba": "hymba"}


def peer(method, train, test, seed):
    """Accuracy of one of aeon's classifiers with its defaults; runs in a process of its own."""
    import warnings

    warnings.filterwarnings("ignore")
    import numpy as np
    from aeon.datasets import load_from_ts_file

    (x, y), (tx, ty) = load_from_ts_file(train), load_from_ts_file(test)
    if method == "dtw":
        from aeon.classification.distance_based import KNeighborsTimeSeriesClassifier as Classifier

        model = Classifier(n_neighbors=1, distance="dtw", n_jobs=2)
    else:
        from aeon.classification import convolution_based as c

        if isinstance(x, list):  # of unequal lengths, which both refuse: zeros at the end
            length = max(s.shape[1] for s in x + tx)
            x, tx = (np.stack([np.pad(s, ((0, 0), (0, length - s.shape[1]))) for s in part]) for part in (x, tx))
        kind = c.RocketClassifier if method == "rocket" else c.MultiRocketHydraClassifier
        model = kind(random_state=seed, n_jobs=2)
    model.fit(x, y)
    print(json.dumps({"accuracy": float(np.mean(np.asarray(model.predict(tx)) == np.asarray(ty)))}))


def run(method, folder, seed, command):
    name = os.path.basename(os.path.normpath(folder))
    train, test = (os.path.join(folder, f"{name}_{part}.ts") for part in ("TRAIN", "TEST"))
    env = {**os.environ, "RAYON_NUM_THREADS": "2", "NUMBA_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"}
    with tempfile.TemporaryDirectory() as out:
        if method == "hymba":
            line = [*command, train, test, "--seed", str(seed), "--out", out]
        else:
            line = [os.environ.get("PY", sys.executable), __file__, "--peer", method, train, test, str(seed)]
        start = time.time()
        done = subprocess.run(line, env=env, capture_output=True, text=True)
        seconds = time.time() - start
    found = re.search(r'"accuracy": ([0-9.]+)' if method != "hymba" else r"test accuracy ([0-9.]+)", done.stdout)
    if not found:
        sys.exit(f"{' '.join(line)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return {"method": method, "set": name, "seed": seed, "accuracy": float(found[1]), "seconds": round(seconds, 1)}


def table(runs):
    methods = [m for m in METHODS if any(r["method"] == m for r in runs)]
    sets = list(dict.fromkeys(r["set"] for r in runs))
    print("| set | " + " | ".join(METHODS[m] for m in methods) + " |\n|---|" + "---|" * len(methods))
    means = {m: [] for m in methods}
    for name in sets:
        cells = []
        for m in methods:
            some = [r for r in runs if (r["method"], r["set"]) == (m, name)]
            if not some:
                cells.append("-")
                continue
            accuracy = st.mean(r["accuracy"] for r in some)
            means[m].append(accuracy)
            cells.append(f"{accuracy:.3f} ({st.mean(r['seconds'] for r in some):.0f} s)")
        print(f"| {name} | " + " | ".join(cells) + " |")
    complete = [f"{st.mean(means[m]):.4f}" if len(means[m]) == len(sets) else "-" for m in methods]
    print("| mean | " + " | ".join(complete) + " |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peer"]:
        peer(*sys.argv[2:5], int(sys.argv[5]))
        sys.exit()
    ours = sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else []
    ap = argparse.ArgumentParser()
    ap.add_argument("--seeds", default="0,1,2")
    ap.add_argument("--methods", default="dtw,rocket,mrh" + (",hymba" if ours else ""))
    ap.add_argument("--results")
    ap.add_argument("folders", nargs="+")
    a = ap.parse_args(sys.argv[1 : len(sys.argv) - len(ours) - 1] if ours else sys.argv[1:])
    runs = [json.loads(line) for line in open(a.results)] if a.results and os.path.exists(a.results) else []
    for folder in a.folders:
        for method in a.methods.split(","):
            for seed in map(int, a.seeds.split(",")) if method != "dtw" else [0]:
                name = os.path.basename(os.path.normpath(folder))
                if any((r["method"], r["set"], r["seed"]) == (method, name, seed) for r in runs):
                    continue
                runs.append(run(method, folder, seed, ours))
                print(json.dumps(runs[-1]), file=sys.stderr)
                if a.results:
                    with open(a.results, "a") as file:
                        print(json.dumps(runs[-1]), file=file)
    table(runs)
