"""Short texts of the kinds that small models are trained on, for `apr qa`: a model must predict one of them."""

TEXTS = {
    "story": """Once upon a time there was a little girl named Lily. She lived in a small house near the forest with her \
mom and her dad. One day, Lily went outside to play in the garden. She saw a big red ball under the tree. "Mom, look!" \
she said. "I found a ball!" Her mom smiled and said, "That is a nice ball. Maybe it belongs to Tom." Lily was sad, because \
she wanted to keep the ball. But she knew that Tom would miss it. So she took the ball to his house and knocked on the \
door. Tom was very happy to see his ball again. He said, "Thank you, Lily! Do you want to play with me?" Lily smiled, and \
they played together in the park all day. At the end of the day, they were tired and went home. Lily was happy that she \
had made a new friend.""",
    "python": '''import os
import sys


class Reader:
    """Read lines from a file and count them."""

    def __init__(self, path, encoding="utf-8"):
        self.path = path
        self.encoding = encoding
        self.lines = []

    def read(self):
        """Return the list of lines, without line ends."""
        if not os.path.exists(self.path):
            raise FileNotFoundError(self.path)
        with open(self.path, encoding=self.encoding) as f:
            for line in f:
                line = line.rstrip("\\n")
                if not line or line.startswith("#"):
                    continue
                self.lines.append(line)
        return self.lines

    def __len__(self):
        return len(self.lines)


def main(argv=None):
    if argv is None:
        argv = sys.argv[1:]
    for name in argv:
        reader = Reader(name)
        reader.read()
        print(name, len(reader))
    return 0


if __name__ == "__main__":
    sys.exit(main())
''',
    "article": """The history of the city begins in the twelfth century, when the first stone bridge was built over the \
river. In the following years the town became an important centre of trade, and its population grew to more than ten \
thousand people. The old church, which was completed in 1348, is one of the largest buildings of its kind in the country. \
During the war the city was destroyed in part, but most of the houses in the old town were built again in the same style. \
Today the city is known for its university, which was founded in 1477, and for its many museums and parks. According to \
the last census, it has a population of about 90,000, of whom a third are students. The main industries are medicine, \
research and tourism. There is a railway station in the centre of the city, with trains to all the larger cities of the \
region.""",
}
