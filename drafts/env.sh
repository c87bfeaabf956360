if [ ! -e /tmp/site/fastapi ]; then mkdir -p /tmp/site; for f in .gpu/w/*.whl; do python3 -m zipfile -e $f /tmp/site & done; wait; fi
export PYTHONPATH=/tmp/site:$PWD/src BENTHIC_COMMIT=$1 PYTHONDONTWRITEBYTECODE=
export OMP_NUM_THREADS=4
