"""Who starts whom, and who trusts whom: two of the schematics that ``diagrams.py`` writes."""

from svg import (
    EVALUATE,
    FAINT,
    FEDERATED,
    GREY,
    INK,
    MUTED,
    NEUTRAL,
    ON,
    PANEL,
    TRAIN,
    TROUBLE,
    WIDTH,
    Picture,
)

ANSWERS = (
    "The CA signs: this certificate is the SuperLink's.",
    "Is this the SuperLink? Nodes and flwr check its certificate with their copy of ca.crt.",
    "Is this one of our nodes? The SuperLink checks the signature on each request of a node.",
    "Who hands in this run? The SuperLink does not ask, so a proxy must keep strangers out.",
)


def draw_starts() -> Picture:
    """Draw the processes of a simulation and of a deployment."""
    picture = Picture(
        *("who-starts-whom", WIDTH, 420, "Who starts whom, in a simulation and in a deployment."),
        "Two panels with boxes. In a simulation, flwr run hands a run to the SuperLink, whose "
        "SuperExec starts flwr-simulation. Your ServerApp runs in it as a thread. It starts Ray's "
        "actors, one for each core, which run your ClientApp. In a deployment, the SuperLink's "
        "SuperExec starts flwr-serverapp, a process with your ServerApp. Each SuperNode calls the "
        "SuperLink. Its SuperExec starts a flwr-clientapp with your ClientApp for each message.",
    )
    for x, name, words in (
        (14.0, "Simulation", "one machine plays all nodes"),
        (388.0, "Deployment", "a SuperNode for each node"),
    ):
        picture.box(x, 14, 358, 364, GREY, FAINT)
        picture.heading(x + 14, x + 344, 38, name, words)
        process(picture, x + 14, 56, "flwr run")
        picture.arrow((x + 80, 88), (x + 80, 130), colour=TRAIN, line=2, dash="5 3")
        picture.words(x + 90, 114, "hands in a run", MUTED)
        chain(picture, x + 14, "SuperLink")
    process(picture, 28, 288, "flwr-simulation", "your ServerApp", "in a thread")
    picture.arrow((160, 314), (224, 314))
    picture.words(193, 306, "starts", MUTED, anchor="middle")
    picture.words(193, 332, "with Ray", MUTED, anchor="middle")
    process(picture, 226, 288, "Ray's actor", "your ClientApp", "one for each core", 3)
    for k, words in enumerate(
        ("The first flwr command", "also starts the SuperLink,", "if there is none.")
    ):
        picture.words(190, 150 + 16 * k, words)
    for k, words in enumerate(
        ("In a notebook, simulate()", "puts the kernel in place", "of the column on the left.")
    ):
        picture.words(190, 216 + 16 * k, words)
    process(picture, 402, 288, "flwr-serverapp", "your ServerApp", "one for each run")
    chain(picture, 596, "SuperNode", 3)
    picture.arrow((596, 148), (536, 148), colour=TRAIN, line=2, dash="5 3")
    picture.words(565, 140, "calls", MUTED, anchor="middle")
    process(picture, 596, 288, "flwr-clientapp", "your ClientApp", "one for each message")
    picture.line((20, 399), (52, 399), colour=FEDERATED, line=3)
    picture.words(60, 403.5, "runs your code")
    picture.arrow((200, 399), (236, 399))
    picture.words(244, 403.5, "starts a process")
    picture.arrow((400, 399), (436, 399), colour=TRAIN, line=2, dash="5 3")
    picture.words(444, 403.5, "talks to")
    return picture


def chain(picture: Picture, x: float, name: str, copies: int = 1) -> None:
    """Draw a SuperLink or SuperNodes, and the SuperExec that starts an app's process."""
    process(picture, x, 132, name, copies=copies)
    process(picture, x, 210, "SuperExec")
    for y in (164, 242):
        picture.arrow((x + 66, y), (x + 66, y + 44))
        picture.words(x + 74, y + 26, "starts", MUTED)


def process(
    picture: Picture, x: float, y: float, name: str, app: str = "", note: str = "", copies: int = 1
) -> None:
    """Draw a process; one with an app runs the reader's code."""
    high, edge, line = (52.0, FEDERATED, 2.5) if app else (32.0, NEUTRAL, 1.2)
    for k in reversed(range(copies)):
        picture.box(x + 5 * k, y - 5 * k, 132, high, PANEL, edge, line if k == 0 else 1.2)
    picture.words(x + 66, y + 20.5, name, bold=not app, anchor="middle", code=bool(app))
    picture.words(x + 66, y + 40, app, bold=True, anchor="middle")
    picture.words(x + 66, y + 70, note, MUTED, anchor="middle")


def draw_trust() -> Picture:
    """Draw who holds which file, and what is checked with it."""
    picture = Picture(
        *("who-trusts-whom", WIDTH, 386, "Who trusts whom, with what."),
        "A certificate authority (CA) stands above three boxes. You, with the flwr command, hold a "
        "copy of ca.crt, and no key. The SuperLink holds the certificate server.pem, its "
        "private server.key, and the public keys of the registered nodes. Each SuperNode holds a "
        "copy of ca.crt and a private key. Arrow 1, from the CA to the SuperLink: "
        f"{ANSWERS[0]} Arrow 2, from you and from the SuperNodes to the SuperLink: {ANSWERS[1]} "
        f"Arrow 3, from the SuperLink to the SuperNodes: {ANSWERS[2]} Arrow 4, dashed and red, "
        f"from the SuperLink to you: {ANSWERS[3]}",
    )
    you, link, node = 16.0, 273.0, 530.0  # where the boxes begin
    holder(picture, link, 14, 72, "Authority (CA)", ("ca.crt",))
    for x, start, words_x, end in ((116.0, link, 194, 120), (630.0, link + 200, 552, 110)):
        picture.arrow((start, 44), (x, 44), (x, end), dash="5 3")
        picture.words(words_x, 36, "copies of ca.crt", MUTED, anchor="middle")
    for k in (2, 1):
        picture.box(node + 5 * k, 122 - 5 * k, 200, 132, GREY, NEUTRAL)
    holder(picture, you, 122, 132, "You, with flwr", ("ca.crt",))
    picture.box(you + 12, 184, 176, 24, PANEL, TROUBLE, dash="5 3")
    picture.words(you + 100, 200.5, "no key of your own", TROUBLE, anchor="middle")
    files = "certificate server.pem", "public keys of nodes"
    holder(picture, link, 122, 132, "SuperLink", files, "server.key")
    holder(picture, node, 122, 132, "SuperNode", ("ca.crt",), "node-0")
    colours = {"1": NEUTRAL, "2": TRAIN, "3": EVALUATE, "4": TROUBLE}
    for number, x, y, to_x, to_y in (
        ("1", link + 100, 86.0, link + 100, 120.0),
        ("2", you + 200, 166.0, link - 2, 166.0),
        ("4", link, 214.0, you + 202, 214.0),
        ("2", node, 166.0, link + 202, 166.0),
        ("3", link + 200, 214.0, node - 2, 214.0),
    ):
        colour, dash = colours[number], "5 3" if number == "4" else ""
        picture.arrow((x, y), (to_x, to_y), colour=colour, line=2, dash=dash)
        middle = x + 0.43 * (to_x - x), y + 0.43 * (to_y - y)  # of the shaft
        picture.disc(*middle, number, colour, ON.get(colour, PANEL))
    for k, answer in enumerate(ANSWERS):
        y, number = 284 + 26 * k, str(k + 1)
        colour = colours[number]
        picture.disc(32, y, number, colour, ON.get(colour, PANEL))
        picture.words(50, y + 4.5, answer)
    picture.box(542, 276, 24, 16, INK)
    picture.words(574, 288.5, "stays with its owner")
    return picture


def holder(
    picture: Picture,
    x: float,
    y: float,
    high: float,
    name: str,
    public: tuple[str, ...],
    private: str = "",
) -> None:
    """Draw who holds which files; a private one is dark."""
    picture.box(x, y, 200, high, GREY, NEUTRAL, 1.5)
    picture.words(x + 12, y + 22, name, size=13, bold=True)
    y += 32
    for file in public:
        picture.box(x + 12, y, 176, 24, PANEL, FAINT)
        picture.words(x + 100, y + 16.5, file, anchor="middle")
        y += 30
    if private:
        picture.box(x + 12, y, 176, 24, INK)
        picture.words(x + 100, y + 16.5, f"{private}: private", PANEL, anchor="middle")
