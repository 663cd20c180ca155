"""What the tests in a browser need: playwright from the package index, chromium from Debian (as root).

    python tests/install_browser.py
"""
import importlib.util
import os
import shutil
import subprocess
import sys


def run(*command): subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


if __name__ == "__main__":
    if not importlib.util.find_spec("playwright"): run(sys.executable, "-m", "pip", "install", "-q", "playwright")
    if not shutil.which("chromium"):
        if not shutil.which("apt-get"): sys.exit("There is no apt-get here; install chromium by other means and put it on the PATH.")
        sudo = [] if os.geteuid() == 0 else ["sudo"]
        run(*sudo, "apt-get", "update", "-q")
        run(*sudo, "apt-get", "install", "-q", "-y", "--no-install-recommends", "chromium", "fonts-dejavu-core")
    print("chromium:", shutil.which("chromium"))
