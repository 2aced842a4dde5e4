"""What the pages of evaluation/ share: gradio where it is installed, and where they are served."""

import importlib.util
import ipaddress
import os
from collections.abc import Iterator
from dataclasses import dataclass

from utils.errors import UserError
from utils.settings.fields import Settings, setting

MISSING = "gradio is not installed; pip install -r requirements-eval.txt"


@dataclass
class WebSettings(Settings):
    host: str = setting(
        "127.0.0.1", "address of the page; 127.0.0.1: this machine only, 0.0.0.0: everybody"
    )
    port: int = setting(7860, "its port; 0: a free one", below=65536)

    def of_web(self, wanted: bool) -> Iterator[str]:
        if wanted and importlib.util.find_spec("gradio") is None:
            yield MISSING
        default = WebSettings()
        if not wanted and (self.host, self.port) != (default.host, default.port):
            yield "host and port are read only with --web; set it, or leave them out"


def is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def library():
    """The module gradio, which then asks nobody on the network for anything."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio
    except ImportError as error:
        raise UserError(MISSING) from error
    return gradio


def theme():
    """Fonts of the reader's system: gradio's own are fetched from elsewhere."""
    return library().themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )


def serve(page, config: WebSettings, **more) -> None:
    """Serve a page until Ctrl-C."""
    if not is_local(config.host):
        print(
            f"open to the network: whoever reaches {config.host} may use this page, without a "
            "password. --host 127.0.0.1 keeps it on this machine",
            flush=True,
        )
    try:
        _, address, _ = page.queue().launch(
            server_name=config.host,
            server_port=config.port or None,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            **more,
        )
    except OSError as error:
        raise UserError(f"port {config.port} of {config.host}: {error}; set --port") from error
    print(f"serving on {address} (Ctrl-C ends)", flush=True)
    page.block_thread()
