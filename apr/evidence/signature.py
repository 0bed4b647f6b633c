"""Sign evidence.json with a key of the user's, and check the signature: `ssh-keygen -Y`, in the namespace "apr-run".

Hashes show that files belong together, not who computed them: whoever can change a run can seal it again. A signature by
a key that this person does not have is what such a change cannot get past.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from ..common.atomic import write_text
from ..common.errors import Refused, UsageError
from ..common.shell import word
from .seal import SIGNATURE

NAMESPACE, SECONDS = "apr-run", 60.0


def sign(run: Path, key: Path, evidence: bytes) -> Path:
    """Write the signature of `evidence`, the bytes of an evidence.json that was checked, beside that of a run: of whatever
    lies there by now it would be that too. key: private key, or public key of one that ssh-agent holds.

    Raises Refused: ssh-keygen does not sign; IOFailure."""
    signature = _ssh_keygen("sign", "-f", str(key), "-n", NAMESPACE, data=evidence)
    if "BEGIN SSH SIGNATURE" not in signature:
        raise Refused(f"{key}: ssh-keygen wrote no signature")
    write_text(run / SIGNATURE, signature)
    return run / SIGNATURE


def signer(run: Path, signers: Path, evidence: bytes) -> str:
    """Check the signature of `evidence`, the bytes of a run's evidence.json, against a file of allowed signers (ssh-keygen(1),
    ALLOWED SIGNERS); returns the name of the signer. Raises Refused."""
    signature = run / SIGNATURE
    if not signature.is_file():
        raise Refused(
            f"{signature}: not there: nobody signed this run; `apr verify {word(run)} --sign KEY` does"
        )
    if not signers.is_file():
        raise UsageError(f"--signers {signers}: no such file; give one of lines NAME KEY-TYPE KEY")
    found = _ssh_keygen("find-principals", "-f", str(signers), "-s", str(signature)).split("\n")[0].strip()
    if not found:
        raise Refused(f"{signature}: not by a key of {signers}")
    _ssh_keygen(
        "verify", "-f", str(signers), "-I", found, "-n", NAMESPACE, "-s", str(signature), data=evidence
    )
    return found


def _ssh_keygen(what: str, *args: str, data: bytes = b"") -> str:
    """Call ssh-keygen -Y; returns what it prints. Raises Refused."""
    command = ["ssh-keygen", "-Y", what, *args]
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=SECONDS, check=False)
    except FileNotFoundError:
        raise Refused(
            "ssh-keygen is not installed (OpenSSH 8.2 or newer): it signs, and checks signatures"
        ) from None
    except subprocess.TimeoutExpired:
        raise Refused(
            f"ssh-keygen -Y {what} took over {SECONDS:g} s; a key with a passphrase needs ssh-agent"
        ) from None
    if done.returncode:
        said = (done.stderr + done.stdout).decode("utf-8", "replace").strip().split("\n")[-1]
        raise Refused(f"ssh-keygen -Y {what}: {said or f'ended with code {done.returncode}'}")
    return done.stdout.decode("utf-8", "replace")
