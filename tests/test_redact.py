import io
import subprocess
import sys

import pytest

from darkmatter import params
from darkmatter.redact import Redacting, redact


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot read s3://KEY:secret@bucket/a: no", "cannot read s3://***@bucket/a: no"),
        ("postgresql+psycopg://me:p%40ss@host:5432/db", "postgresql+psycopg://***@host:5432/db"),
        ("http://me:p@ss@host/a http://you:x@b", "http://***@host/a http://***@b"),
        ("('https://token@host/x', 3)", "('https://***@host/x', 3)"),
        ("https://h/a.tar?X-Amz-Signature=abc&X-Amz-Date=1", "https://h/a.tar?X-Amz-Signature=***&X-Amz-Date=1"),
        ("https://h/a?sig=abc%2F&token=t", "https://h/a?sig=***&token=***"),
        ("postgresql://h/db?user=me&password=x", "postgresql://h/db?user=me&password=***"),
        ("s3://bucket/me@example.org/a.png", "s3://bucket/me@example.org/a.png"),
        ("folder:/data/a@b, mail me@example.org, a:b@c", "folder:/data/a@b, mail me@example.org, a:b@c"),
        ("https://host/a?page=3&design=blue", "https://host/a?page=3&design=blue"),
    ],
)
def test_of_an_address_the_password_is_hidden_and_nothing_else(text: str, shown: str) -> None:
    assert redact(text) == shown
    stream = io.StringIO()
    assert Redacting(stream).write(text) == len(text)
    assert stream.getvalue() == shown


_STAGE = """
import sys
from darkmatter import console
def stage():
    print("reading s3://KEY:canary1@bucket")
    print("also http://me:canary2@host", file=sys.stderr)
    raise {error}("http://me:canary3@host is away")
console.run(stage)
"""


@pytest.mark.parametrize("error", ["ValueError", "RuntimeError"])
def test_a_stage_prints_no_password_and_none_in_its_last_words_or_traceback(error: str) -> None:
    done = subprocess.run([sys.executable, "-c", _STAGE.format(error=error)], capture_output=True, text=True)
    assert done.returncode == (2 if error == "ValueError" else 1)
    assert "canary" not in done.stdout + done.stderr.replace('print("', "")
    assert "s3://***@bucket" in done.stdout
    assert "http://***@host is away" in done.stderr


def test_a_password_in_params_is_refused_by_the_name_of_its_key(tmp_path) -> None:
    path = tmp_path / "params.yaml"
    sections = "".join(f"{name}: {{}}\n" for name in params.SECTIONS if name != "place")
    for value in ("s3://KEY:canary@bucket", "https://h/a.tar?X-Amz-Signature=canary", "[a, 'b://c:canary@d']"):
        path.write_text(f"{sections}place:\n  data: {value}\n")
        with pytest.raises(params.ParamsError, match=r"place\.data.* holds a password or key .*\*\*\*") as refused:
            params.read(path)
        assert "canary" not in str(refused.value)
