"""Model servers on this machine."""

import json
import os
import socket
import ssl
import subprocess
import time
import urllib.request

# The proxy downloads nothing. It accepts every client, because it listens on this machine only.
LITELLM = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true"}


class Served:
    """A model server on this machine, which runs until `end` is called."""

    def __init__(self, command, path, log, env=None, authority=None):
        """Starts the server and waits until it answers at `path`. The port replaces PORT in the command, and is in the environment variable
        PORT. With `authority`, a file of CA certificates, the server uses TLS."""
        context = ssl.create_default_context(cafile=authority) if authority else None
        self.address = f"{'https' if authority else 'http'}://127.0.0.1"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address += f":{self.port}"
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        with open(log, "w") as out:
            command = [str(part).replace("PORT", str(self.port)) for part in command]
            env = os.environ | {"PORT": str(self.port)} | (env or {})
            self.process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=env)
        for _ in range(600):
            try:
                with urllib.request.urlopen(self.address + path, timeout=5, context=context):
                    return
            except OSError:
                if self.process.poll() is not None:
                    break
                time.sleep(0.2)
        self.end()
        raise SystemExit(f"FAILED  {command[0]} does not serve, see {log}\n0 passed, 1 failed")

    def end(self):
        self.process.terminate()
        self.process.wait()


def litellm(program, folder, name, address, log, key="none", authority=None):
    """Starts LiteLLM's proxy from the virtual environment `program`, in front of the model `name` at the base URL `address`. Writes the
    configuration of the proxy into `folder`."""
    config = folder / "litellm.yaml"
    model = {"model_name": name, "litellm_params": {"model": f"openai/{name}", "api_base": address, "api_key": key}}
    config.write_text(json.dumps({"model_list": [model], "litellm_settings": {"telemetry": False}}))
    command = [program / "bin/python", "-m", "litellm.proxy.proxy_cli", "--config", config, "--host", "127.0.0.1", "--port", "PORT"]
    trusts = {"SSL_CERT_FILE": str(authority)} if authority else {}
    return Served(command, "/health/liveliness", log, LITELLM | trusts)
