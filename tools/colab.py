# @title Google Colab only: run this cell first
import sys

# The same in every notebook: make address writes them.
REPOSITORY = ""
BRANCH = "main"

if "google.colab" in sys.modules:
    from http.client import HTTPException
    from importlib import invalidate_caches, metadata, util
    from os import chdir
    from pathlib import Path
    from shutil import rmtree, unpack_archive
    from subprocess import PIPE, STDOUT
    from subprocess import run as command
    from urllib.request import urlopen
    from zipfile import BadZipFile

    class ColabError(Exception):
        def _render_traceback_(self):  # IPython prints this, one line, instead of a traceback
            return [f"Colab: expected {self} and run this cell again."]

    def installed():  # a name may be there twice; the first on the path is the one that counts
        return {p.name: p.version for p in reversed([*metadata.distributions()])}

    archive = f"{REPOSITORY}/archive/{BRANCH}.zip"
    try:
        if not Path("../fedlib").is_dir():
            if not Path("fedlib-course").is_dir():
                Path("fedlib-course.zip").write_bytes(urlopen(archive, timeout=60).read())
                rmtree("unpacked", ignore_errors=True)
                unpack_archive("fedlib-course.zip", "unpacked")
                if not [*Path("unpacked").glob("*/fedlib")]:
                    raise ValueError("no fedlib in it")
                Path("unpacked").rename("fedlib-course")
            chdir(next(Path("fedlib-course").glob("*/notebooks")))
        sys.path.append(str(Path.cwd()))  # where the package course is
    except (OSError, ValueError, HTTPException, BadZipFile) as error:
        got = f"{archive} ({error})" if REPOSITORY else "none"
        wanted = 'a public repository with this BRANCH, REPOSITORY = "https://github.com/you/fork"'
        raise ColabError(f"{wanted}, got {got}. Double-click the title, write it there") from None
    if util.find_spec("fedlib") is None:
        before = installed()
        given = {"torch", "torchvision", "numpy", "scipy", "matplotlib", "psutil"} & before.keys()
        kept = [f"{name}=={before[name]}" for name in given]  # Colab's own, where it has them
        Path("kept.txt").write_text("\n".join(kept), encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "install", "--quiet"]
        own = ("matplotlib", "psutil", "scipy", "dp-accounting")
        pip += ["-c", "kept.txt", "-e", "../fedlib", *own]
        done = command(pip, stdout=PIPE, stderr=STDOUT, encoding="utf-8")
        if done.returncode:
            print(done.stdout)
            raise ColabError("pip to install fedlib, got the above. Restart the session")
        sys.path.append(str(Path("../fedlib").resolve()))
        invalidate_caches()
        # What the kernel had loaded and pip has replaced is loaded anew, unless it is compiled.
        new = {name for name, version in installed().items() if before.get(name) != version}
        files = {name: getattr(module, "__file__", "") for name, module in sys.modules.items()}
        compiled = {
            name.split(".")[0] for name in files if str(files[name]).endswith((".so", ".pyd"))
        }
        packages = metadata.packages_distributions().items()
        replaced = {top for top, owners in packages if set(owners) <= new} - compiled
        for name in [name for name in files if name.split(".")[0] in replaced]:
            del sys.modules[name]
