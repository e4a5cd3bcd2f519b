"""What the tests of several modules share: taken out of test_page."""

import html.parser

EVIL = "<script>alert(1)</script>\"'|`[x](javascript:y)"


class Cells(html.parser.HTMLParser):
    """Visible text, one entry per block: a table row, a definition, a paragraph, a chart."""

    BLOCKS = ("tr", "div", "p", "li", "figure", "svg", "h1", "title", "section", "footer", "ul")

    def __init__(self, text):
        super().__init__()
        self.blocks, self.hidden, self.tags = [""], 0, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.hidden += tag == "style"
        if tag in self.BLOCKS:
            self.blocks.append("")

    def handle_endtag(self, tag):
        self.hidden -= tag == "style"
        if tag in self.BLOCKS:
            self.blocks.append("")

    def handle_data(self, data):
        if not self.hidden:
            self.blocks[-1] += data


def blocks(text):
    return [" ".join(block.split()) for block in Cells(text).blocks if block.strip()]
