#!/bin/sh
# Download the wheels that a bare GPU machine lacks, for a machine that has PyTorch and no network.
#
# usage: tools/gpu_wheels.sh FOLDER [PYTHON-VERSION]        (3.12 where none is named)
# There: pip install --no-index --no-deps --target SITE FOLDER/*.whl
#        PYTHONPATH=SITE python -m benchmarks.gpu --out DIR
#
# Versions come from constraints.txt. bitsandbytes' wheel holds a library for every CUDA version:
# only those of CUDA 12.8 and newer and the CPU's are kept, so that the folder stays under 64 MB.
set -eu
cd "$(dirname "$0")/.."
folder=${1:?usage: tools/gpu_wheels.sh FOLDER [PYTHON-VERSION]}
version=${2:-3.12}
mkdir -p "$folder"
platforms=""
for n in 39 35 34 31 28 27 24 17; do platforms="$platforms --platform manylinux_2_${n}_x86_64"; done
names="trl transformers tokenizers huggingface_hub hf-xet peft datasets dill multiprocess
  bitsandbytes tomlkit gguf httpx2 httpcore2 truststore typer annotated-doc accelerate
  safetensors xxhash fsspec pydantic pydantic_core typing-inspection annotated-types
  typing_extensions"
for name in $names; do
  pinned=$(grep -i "^$name==" constraints.txt) || { echo "$name is not in constraints.txt"; exit 1; }
  # shellcheck disable=SC2086
  ${PYTHON:-python3} -m pip download --quiet --no-deps --only-binary=:all: \
    --python-version "$version" --implementation cp $platforms \
    --platform manylinux2014_x86_64 --platform manylinux1_x86_64 -d "$folder" "$pinned"
done
cd "$folder"
wheel=$(ls bitsandbytes-*.whl)
unzip -l "$wheel" | awk '/libbitsandbytes_/ {print $4}' \
  | grep -v -e 'cuda128' -e 'cuda129' -e 'cuda13' -e 'cpu' | xargs -r zip -q -d "$wheel"
du -sh .
