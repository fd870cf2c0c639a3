"""Writes pause.tar and box.tar, the two images that every test may count on, into the given folder.

There is no registry to pull from, so they are made of Debian's static busybox, as docker archives for `load`.
`localhost/pause:1` sleeps for ever; `localhost/box:1` is a shell with every busybox applet, run as user 65532.
"""
import hashlib
import io
import json
import subprocess
import sys
import tarfile

BUSYBOX = "/bin/busybox"
USER = 65532
TEXTS = {
    "etc/passwd": f"root:x:0:0:root:/:/bin/sh\nbox:x:{USER}:{USER}:box:/workspace:/bin/sh\n",
    "etc/group": f"root:x:0:\nbox:x:{USER}:\n",
    "etc/nsswitch.conf": "passwd: files\nhosts: files dns\n",
}


def entry(archive, name, data=None, **fields):
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    if data is not None:
        info.size = len(data)
    archive.addfile(info, io.BytesIO(data) if data is not None else None)


def layer():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, mode in {"bin": 0o755, "dev": 0o755, "etc": 0o755, "proc": 0o755, "sys": 0o755,
                           "tmp": 0o1777, "workspace": 0o1777}.items():
            entry(archive, name, type=tarfile.DIRTYPE, mode=mode)
        with open(BUSYBOX, "rb") as file:
            entry(archive, "bin/busybox", file.read(), mode=0o755)
        for applet in subprocess.check_output([BUSYBOX, "--list"], text=True).split():
            if applet != "busybox":
                entry(archive, f"bin/{applet}", type=tarfile.SYMTYPE, linkname="busybox")
        for name, text in TEXTS.items():
            entry(archive, name, text.encode(), mode=0o644)
    return buffer.getvalue()


def image(path, tag, layer_bytes, **config):
    digest = hashlib.sha256(layer_bytes).hexdigest()
    manifest = json.dumps({"architecture": "amd64", "os": "linux", "config": {"Env": ["PATH=/bin"], **config},
                           "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]}}).encode()
    name = hashlib.sha256(manifest).hexdigest() + ".json"
    with tarfile.open(path, "w") as archive:
        entry(archive, name, manifest)
        entry(archive, f"{digest}.tar", layer_bytes)
        entry(archive, "manifest.json",
              json.dumps([{"Config": name, "RepoTags": [tag], "Layers": [f"{digest}.tar"]}]).encode())


folder, made = sys.argv[1], layer()
image(f"{folder}/pause.tar", "localhost/pause:1", made, Cmd=["/bin/sleep", "2147483647"])
image(f"{folder}/box.tar", "localhost/box:1", made, Cmd=["/bin/sh"], User=f"{USER}:{USER}", WorkingDir="/workspace")
