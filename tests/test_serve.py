"""The page as a browser has it: served while a run goes on, at two widths, in light and dark, by keyboard."""

import contextlib
import io
import json
import shutil
import subprocess
import threading
from http.client import HTTPConnection

import pytest
from random_run import HOSTILE, N, random_run

from cero_jax.report import __main__ as command
from cero_jax.report.html import write_page
from cero_jax.report.serve import server


@pytest.fixture
def run(tmp_path):
    return random_run(tmp_path)


@contextlib.contextmanager
def served(*run_dirs):
    """The port of a server of these runs."""
    with server([str(each) for each in run_dirs], 0) as serving:
        thread = threading.Thread(target=serving.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield serving.server_address
        finally:
            serving.shutdown()
            thread.join()


def answer(address, path: str, **headers) -> tuple[int, dict, bytes]:
    connection = HTTPConnection(*address, timeout=30)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    return response.status, dict(response.headers), response.read()


def test_a_served_run_is_shown_as_it_goes_on(run):
    run, _ = run
    metrics = run.path / "metrics.jsonl"
    with served(run.path) as address:
        status, headers, page = answer(address, "/")
        assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert b"connect-src 'self'" in page
        assert b'fetch("data.json"' in page
        _, headers, body = answer(address, "/data.json")
        assert json.loads(body)["runs"][0]["spent"] == run.steps[-1]["spent"]
        assert answer(address, "/data.json", **{"If-None-Match": headers["ETag"]})[::2] == (304, b"")
        step = run.steps[-1] | {"step": 12, "spent": run.steps[-1]["spent"] + 16}
        with metrics.open("a") as file:
            file.write(json.dumps(step)[:40])  # half of it is on the disk
        late = json.loads(answer(address, "/data.json")[2])
        assert "half-written" in late["state"]
        assert late["runs"][0]["spent"] == run.steps[-1]["spent"]
        with metrics.open("a") as file:
            file.write(json.dumps(step)[40:] + "\n")
        status, _, body = answer(address, "/data.json", **{"If-None-Match": headers["ETag"]})
        assert (status, json.loads(body)["runs"][0]["spent"]) == (200, step["spent"])
        assert "state" not in json.loads(body)


def test_a_server_gives_nothing_but_the_page_and_to_this_machine_alone(run):
    run, _ = run
    with served(run.path) as address:
        assert address[0] == "127.0.0.1"
        elsewhere = ("/config.json", "/../config.json", "/%2e%2e/config.json", f"/{run.path}/config.json", "/?x")
        for path in (*elsewhere, "//etc/passwd", "/data.json/../metrics.jsonl", "/index.html", "/\\..\\config.json"):
            status, _, body = answer(address, path)
            assert status == 404, path
            assert b"allocator" not in body
        for host in ("evil.example", f"evil.example:{address[1]}", "127.0.0.1", ""):
            assert answer(address, "/data.json", Host=host)[0] == 403
        assert answer(address, "/data.json", Host=f"localhost:{address[1]}")[0] == 200
        connection = HTTPConnection(*address, timeout=30)
        connection.request("POST", "/", body="x")
        assert connection.getresponse().status == 501
        with pytest.raises(SystemExit), contextlib.redirect_stderr(stderr := io.StringIO()):
            command.main([str(run.path), "--serve", str(address[1])])
        assert f"port {address[1]} cannot be had" in stderr.getvalue()


def test_a_run_that_has_nothing_to_show_yet_is_waited_for(run, tmp_path):
    run, _ = run
    whole = (run.path / "metrics.jsonl").read_text()
    (run.path / "metrics.jsonl").write_text("")
    with served(run.path) as address:
        data = json.loads(answer(address, "/data.json")[2])
        assert data["runs"] == []
        assert "no step in it yet" in data["state"]
        assert answer(address, "/")[0] == 200
        (run.path / "metrics.jsonl").write_text(whole)
        assert len(json.loads(answer(address, "/data.json")[2])["runs"]) == 1


@pytest.mark.parametrize("port", ["70000", "-1", "x", "80.5"])
def test_a_port_that_is_none_is_refused(run, port, capsys):
    with pytest.raises(SystemExit):
        command.main([str(run[0].path), f"--serve={port}"])
    assert "must be a port" in capsys.readouterr().err


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="needs a browser")
def test_the_page_in_a_browser(run, tmp_path):
    run, _ = run
    write_page([run], tmp_path / "page.html")
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}/profile",
        "--dump-dom",
    ]
    dom = subprocess.run(
        [*command, tmp_path / "page.html"], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    assert "<title>x, cero, seed 0</title>" in dom
    assert dom.count('class="row"') == N
    assert "&lt;/script&gt;&lt;script&gt;document.title='BROKEN'" in dom
    assert "<b>bold</b>" not in dom.partition('id="data">')[0]
    assert 'aria-sort="descending"' in dom


@pytest.mark.skipif(BROWSER is None, reason="needs a browser")
def test_the_page_at_two_widths_by_keyboard_and_as_it_goes_on(run, tmp_path):
    """In light and dark; needs Playwright, from PyPI: `pip install playwright`."""
    sync_playwright = pytest.importorskip("playwright.sync_api").sync_playwright
    run, _ = run
    other = run._replace(config=run.config | {"seed": 1})
    write_page([run, other], tmp_path / "page.html")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        backgrounds = set()
        for width, scheme in ((1280, "light"), (400, "dark")):
            page = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme).new_page()
            errors: list[str] = []
            page.on("pageerror", lambda error, errors=errors: errors.append(str(error)))
            page.on("console", lambda message, errors=errors: errors.append(message.text))
            page.on("request", lambda request, errors=errors: errors.append(request.url))
            page.goto((tmp_path / "page.html").as_uri())
            backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            page.locator("#sort-0").focus()
            page.keyboard.press("Enter")
            assert page.locator("#prompts th").first.get_attribute("aria-sort") == "descending"
            assert page.locator("#prompts th").first.inner_text() == "# ▼"
            assert page.locator("tr.row").first.get_attribute("data-id") == str(N - 1)
            page.locator(f"#row-{N - 2}").focus()
            page.keyboard.press("Enter")
            assert HOSTILE.split("\u2028")[0] in page.locator(".detail").inner_text()
            assert page.title() == "cero, seed 0 | cero, seed 1"
            page.locator(".strip").first.focus()
            page.keyboard.press("ArrowLeft")
            assert page.locator(".strip i.now").count() == 1
            page.locator("#charts svg[tabindex]").first.focus()
            page.keyboard.press("ArrowRight")
            assert "cero, seed 1" in page.locator("#charts output").first.inner_text()
            assert page.locator(".strip").first.evaluate("strip => strip.clientWidth") > 0.9 * width
            assert page.evaluate("document.documentElement.scrollWidth") == width
            assert errors == [(tmp_path / "page.html").as_uri()]
        assert len(backgrounds) == 2
        with served(run.path) as address:
            page = browser.new_page()
            page.goto("http://{}:{}/".format(*address))
            page.locator("#search").fill("#2")
            page.locator("#row-2").click()
            step = run.steps[-1] | {"step": 12, "spent": run.steps[-1]["spent"] + 16}
            with (run.path / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(step) + "\n")
            page.evaluate("refresh()")
            page.get_by_text(f"{step['spent']} rollouts spent").wait_for()
            assert page.locator(".detail").count() == 1
            assert page.locator("#search").input_value() == "#2"
        browser.close()
