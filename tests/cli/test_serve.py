"""The arguments of ``lightning-peft serve``; ``tests/serving`` tests the server."""

from __future__ import annotations

import socket

import pytest

from lightning_peft.cli.main import main


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--port=70000", "expected a number from 1 to 65535"),
        ("--max_batch_size=0", "is not a number of at least 1"),
        ("--max_queue=-1", "is not a number of at least 1"),
        ("--timeout=0", "is not a number of seconds above 0"),
        ("--timeout=nan", "is not a number of seconds above 0"),
        ("--max_body=big", "is not a size"),
    ],
)
def test_a_limit_that_would_refuse_every_request_is_an_error(argument, said, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["serve", "--model=LanguageModel", f"--adapters={tmp_path}", argument])
    assert said in capsys.readouterr().err + str(stop.value.code)


def test_a_port_in_use_is_an_error_before_the_model_is_loaded(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(SystemExit) as stop:
            main(["serve", "--model=LanguageModel", f"--adapters={tmp_path}", f"--port={port}"])
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use. Choose another --port" in str(stop.value.code)
