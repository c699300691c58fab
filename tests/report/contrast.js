// Of every text in sight: its contrast with what is behind it (WCAG 2.2, 1.4.3), and where it stands.
() => {
  const parse = (color) => {
    const canvas = document.createElement("canvas").getContext("2d");
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const over = (top, bottom) => [0, 1, 2].map((i) => (top[i] * top[3] + bottom[i] * (255 - top[3])) / 255).concat(255);
  const linear = (value) => (value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4);
  const luminance = ([red, green, blue]) => 0.2126 * linear(red) + 0.7152 * linear(green) + 0.0722 * linear(blue);
  const behind = (element) => {
    const own = parse(getComputedStyle(element).backgroundColor);
    return own[3] === 255 || !element.parentElement ? own : over(own, behind(element.parentElement));
  };
  const holdsText = (element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  const isOff = (element) => element.matches("script, option, :disabled, label:has(:disabled)");
  return [...document.querySelectorAll("body *")]
    .filter((element) => holdsText(element) && element.checkVisibility() && !isOff(element))
    .map((element) => {
      const style = getComputedStyle(element);
      const ground = behind(element);
      const text = over(parse(element.ownerSVGElement ? style.fill : style.color), ground);
      const [low, high] = [luminance(text), luminance(ground)].sort((one, other) => one - other);
      return [(high + 0.05) / (low + 0.05), element.outerHTML.slice(0, 90)];
    });
}
