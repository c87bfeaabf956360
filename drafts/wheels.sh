# bash wheels.sh FOLDER: wheels for the GPU machine (Python 3.12), which has torch, triton, transformers, numpy alone
python3 -m pip download -q --disable-pip-version-check --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64 \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --implementation cp --abi cp312 --abi abi3 --abi none --no-deps -d "$1" \
  fastapi starlette pydantic pydantic-core annotated-types annotated-doc typing-inspection typing-extensions msgspec pyzmq prometheus-client \
  uvicorn httptools httpx httpcore h11 anyio sniffio certifi idna llguidance typer rich click shellingham markdown-it-py mdurl pygments uvloop \
  pytest pytest-xdist execnet iniconfig pluggy packaging hypothesis pytest-timeout sortedcontainers opentelemetry-api importlib-metadata zipp aiohttp \
  aiosignal frozenlist multidict yarl propcache aiohappyeyeballs attrs
