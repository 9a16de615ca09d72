#!/bin/sh
# Makes the model here: make.sh DIR, with the program `hymba` in the path and Python 3.11 for the text. On two cores the 5 epochs take
# some minutes; more of them learn the text by heart. What README.md says of its perplexity is then to be found anew, by PyTorch:
# benches/peers/lm_train_bench.py --perplexity DIR/byte_lm DIR/byte_lm/text.txt
set -e
mkdir "$1"
python3.11 -c 'from pydoc_data.topics import topics; import sys; sys.stdout.buffer.write("\n\n".join(topics.values()).encode())' > "$1/topics.txt"
hymba train-lm "$1/topics.txt" --out "$1/f32" --hidden 128 --layers 4 --epochs "${EPOCHS:-5}"
hymba quantize "$1/f32" "$1/byte_lm" --to bf16
# train-lm holds out the last twentieth
size=$(wc -c < "$1/topics.txt")
tail -c $((size / 20)) "$1/topics.txt" > "$1/byte_lm/text.txt"
