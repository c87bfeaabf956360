"""The real HTTP server round the engine without a model. Arguments: tokenizer folder, port, JSON settings."""

from __future__ import annotations

import functools
import json
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import fake_engine

from benthic.dash.page import DashPage
from benthic.serve import http, launch, server
from benthic.serve.service import ServiceSettings
from benthic.serve.tokenizer import Tokenizer


def main() -> int:
    folder, port, settings = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    logging.basicConfig(level=logging.INFO)
    bound = launch.bind("127.0.0.1", port)
    tokenizer = Tokenizer.from_folder(folder)
    template = launch.read_template(tokenizer, None) if settings.pop("template", True) else None
    max_num_seqs, max_waiting = settings.pop("max_num_seqs", 32), settings.pop("max_waiting", 1024)
    step_seconds = settings.pop("step_seconds", 0.0)
    parts = http.Parts(
        tokenizer=tokenizer,
        template=template,
        settings=ServiceSettings(
            served_names=("fake", "other/name"),
            root="fake",
            max_num_seqs=max_num_seqs,
            max_waiting=max_waiting,
        ),
        options=http.ServerOptions(**settings, access_log=False),
        wall=lambda: 1_700_000_000.0,
        page=DashPage,
    )
    return server.run(functools.partial(fake_engine.fake, step_seconds, max_num_seqs), bound, parts)
