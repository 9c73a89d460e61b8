// node echo.js serve PORT | node echo.js call HOST PORT SIZE COUNT: the same as echo.go.
const http = require("http");
const crypto = require("crypto");
const [mode, ...rest] = process.argv.slice(2);
if (mode === "serve") {
  http.createServer((request, response) => request.pipe(response)).listen(Number(rest[0]), "127.0.0.1");
} else {
  const [host, port, size, count] = [rest[0], ...rest.slice(1).map(Number)];
  const body = Buffer.alloc(size, "0123456789abcdef");
  const sum = crypto.createHash("sha256");
  const agent = new http.Agent({ keepAlive: true });
  const call = (left) => {
    if (!left) return console.log(sum.digest("hex")) || process.exit(0);
    const request = http.request({ host, port, agent, method: "POST", headers: { "content-length": size } }, (response) => {
      const pieces = [];
      response.on("data", (piece) => pieces.push(piece));
      response.on("end", () => {
        const got = Buffer.concat(pieces);
        if (!got.equals(body)) throw new Error("other bytes came back");
        sum.update(got);
        call(left - 1);
      });
    });
    request.end(body);
  };
  call(count);
}
