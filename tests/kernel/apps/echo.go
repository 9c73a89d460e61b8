// A net/http server and client for the accelerated hop: `echo serve PORT` answers a request with its body, `echo call URL SIZE COUNT`
// posts and compares. io.Copy between two TCP connections splices, which an accelerated socket cannot: `echo splice PORT TARGET`.
package main

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"sync"
)

func main() {
	switch os.Args[1] {
	case "serve":
		http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
			body, _ := io.ReadAll(r.Body)
			w.Write(body)
		})
		fmt.Println(http.ListenAndServe("127.0.0.1:"+os.Args[2], nil))
	case "splice":
		listener, err := net.Listen("tcp", "127.0.0.1:"+os.Args[2])
		if err != nil {
			panic(err)
		}
		for {
			down, _ := listener.Accept()
			go func() {
				up, err := net.Dial("tcp", os.Args[3])
				if err != nil {
					down.Close()
					return
				}
				go func() { io.Copy(down, up); down.Close() }()
				io.Copy(up, down)
				up.(*net.TCPConn).CloseWrite()
			}()
		}
	case "call":
		size, _ := strconv.Atoi(os.Args[3])
		count, _ := strconv.Atoi(os.Args[4])
		body := bytes.Repeat([]byte("0123456789abcdef"), size/16)
		sum := sha256.New()
		var lock sync.Mutex
		var group sync.WaitGroup
		for worker := 0; worker < 4; worker++ {
			group.Add(1)
			go func() {
				defer group.Done()
				for turn := 0; turn < count; turn++ {
					answer, err := http.Post(os.Args[2], "application/octet-stream", bytes.NewReader(body))
					if err != nil {
						panic(err)
					}
					got, err := io.ReadAll(answer.Body)
					answer.Body.Close()
					if err != nil || !bytes.Equal(got, body) {
						panic("other bytes came back")
					}
					lock.Lock()
					sum.Write(got)
					lock.Unlock()
				}
			}()
		}
		group.Wait()
		fmt.Printf("%x\n", sum.Sum(nil))
	}
}
